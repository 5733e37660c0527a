"""What a run prints: rewritten in a terminal, plain lines in a pipe, nothing when quiet."""

import os
import pty
import re
import select
import subprocess
import sys
import time

import pytest

from semi_fast.observe import console
from semi_fast.observe.console import fitting

REST = "loss 1.000 | 100 img/s | data wait 0.0% | acc 50.0"  # of a plain line
ERASE = "\x1b[2K"  # the whole line
CODES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
SCRIPT = """
from semi_fast.observe.console import Console
console = Console(20, quiet={quiet})
console.say("data: digits")
console.step(0)
figures = {{"loss/total": 1.0, "throughput/images_per_s": 100.0, "time/data_wait_share": 0.0}}
for step in range(1, 21):
    console.step(step, lambda: 20.0 - step)
    console._drawn = 0.0  # time passes
    if step % 5 == 0:
        console.window(step, figures, 50.0, 20.0 - step, keep=step % 10 == 0)
console.warn("stopping")
console.say("warning: the disk is full")
console.box("run is done", [("accuracy", "best 50.00"), ("next", "python -m semi_fast predict runs/x IMAGES")])
"""


@pytest.mark.parametrize(
    ("parts", "width", "line"),
    [
        (["step 5/10 50%", "eta 5s", "100 img/s"], 80, "step 5/10 50% | eta 5s | 100 img/s"),
        (["step 5/10 50%", "eta 5s", "100 img/s"], 34, "step 5/10 50% | eta 5s | 100 img/s"),
        (["step 5/10 50%", "eta 5s", "100 img/s"], 33, "step 5/10 50% | eta 5s"),
        (["step 5/10 50%", "", "100 img/s"], 30, "step 5/10 50% | 100 img/s"),
        (["step 5/10 50%"], 6, "step 5"),
    ],
)
def test_a_line_is_cut_between_figures(parts, width, line):
    assert fitting(parts, width) == line


def environment(root, **more):
    kept = {k: v for k, v in os.environ.items() if k not in ("CI", "NO_COLOR", "TERM", "COLUMNS", "LINES")}
    return {**kept, "TERM": "xterm-256color", "PYTHONPATH": str(root), **more}


def in_terminal(root, columns=80, quiet=False, **more):
    """What the script writes to a terminal of that width."""
    leader, follower = pty.openpty()
    os.set_blocking(leader, False)
    size = f"import fcntl,struct,termios; fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack('HHHH', 24, {columns}, 0, 0))"
    process = subprocess.Popen(
        [sys.executable, "-c", size + SCRIPT.format(quiet=quiet)],
        stdin=follower, stdout=follower, stderr=follower, env=environment(root, **more), close_fds=True,
    )  # fmt: skip
    os.close(follower)
    seen, end = b"", time.monotonic() + 120
    while time.monotonic() < end:
        if select.select([leader], [], [], 0.1)[0]:
            try:
                chunk = os.read(leader, 65536)
            except OSError:  # Linux says EIO once the other end is closed
                break
            if not chunk:
                break
            seen += chunk
        elif process.poll() is not None:
            break
    os.close(leader)
    assert process.wait(10) == 0, seen.decode()
    return seen.decode().replace("\r\n", "\n")


def on_screen(text, columns):
    """The lines left on the screen after every return to the line's start, and every erasure, was obeyed."""
    lines = []
    for row in text.split("\n"):
        shown = ""
        for part in row.split("\r"):
            assert len(shown) <= columns, "a rewritten line must not wrap"
            rest, part = "" if part.startswith(ERASE) else shown, CODES.sub("", part)
            shown = part + rest[len(part) :]
        lines.append(shown.rstrip())
    return lines


def in_pipe(root, quiet=False, **more):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(quiet=quiet)],
        env=environment(root, **more),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done


def test_in_a_terminal_one_line_is_rewritten_and_gone_at_the_end(root):
    text = in_terminal(root)
    assert text.count("\r") > 20
    assert "step 20/20 100% | eta 0s | 100 img/s | acc 50.0 | loss 1.000" in text
    lines = on_screen(text, 80)
    assert lines[:5] == [
        "data: digits",
        f"step 10/20 | {REST} | eta 10s",
        f"step 20/20 | {REST} | eta 0s",
        "stopping",
        "warning: the disk is full",
    ]
    assert "run is done" in lines[5]
    assert lines[5].startswith("╭")
    assert lines[6].startswith("│ accuracy  best 50.00")
    assert [line for line in lines[9:] if line] == []


def test_a_narrow_terminal_shows_what_matters_most(root):
    text = in_terminal(root, columns=40)
    assert "step 20/20 100% | eta 0s | 100 img/s" in text
    assert "100 img/s | acc 50.0" not in text
    lines = on_screen(text, 40)
    assert "next: python -m semi_fast predict runs/x IMAGES" in lines, "a command that can be copied"


def test_no_color_is_honored(root):
    colored = re.compile(r"\x1b\[[0-9;]*3[0-7]m")
    assert colored.search(in_terminal(root))
    assert not colored.search(in_terminal(root, NO_COLOR="1"))


@pytest.mark.parametrize("more", [{"TERM": "dumb"}, {"CI": "true"}])
def test_a_dumb_terminal_and_a_ci_log_get_plain_lines(root, more):
    text = in_terminal(root, **more)
    assert "\r" not in text
    assert "\x1b" not in text
    assert f"step 5/20 | {REST} | eta 15s\nstep 10/20 | {REST} | eta 10s\n" in text


def test_a_pipe_gets_plain_lines(root):
    done = in_pipe(root, FORCE_COLOR="1")
    assert "\r" not in done.stdout + done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    assert done.stdout.splitlines() == [
        "data: digits",
        *(f"step {step}/20 | {REST} | eta {20 - step}s" for step in (5, 10, 15, 20)),
        "warning: the disk is full",
        "accuracy: best 50.00",
        "next: python -m semi_fast predict runs/x IMAGES",
    ]
    assert done.stderr == "stopping\n"


def test_quiet_prints_warnings_alone(root):
    done = in_pipe(root, quiet=True)
    assert done.stdout == ""
    assert done.stderr == "stopping\nwarning: the disk is full\n"
    assert in_terminal(root, quiet=True) == "stopping\nwarning: the disk is full\n"


def test_live_figures_of_a_window_without_an_accepted_step():
    figures = {"throughput/images_per_s": 100.0, "time/data_wait_share": 0.5}
    assert console.live_parts(figures, None) == ["100 img/s", "loss not finite", "data wait 50.0%"]
