"""The command that proves and measures a card: its order, limits and failures, and every part with the CPU as card."""

import json
import re
import sys
import time
from types import SimpleNamespace

import psutil
import pytest
import torch

from benchmarks import gpu, gpu_parts

CPU = torch.device("cpu")


@pytest.fixture
def found():
    return {}


@pytest.fixture
def lab(tmp_path, found):
    return gpu_parts.Lab(CPU, gpu_parts.SMALL, tmp_path, None, found.__setitem__)


def figures_of(folder, name="gpu-cpu"):
    return json.loads((folder / f"{name}.json").read_text())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_card_it_says_so_in_one_line(capsys):
    assert gpu.main([]) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", "error: benchmarks.gpu needs a CUDA device, and PyTorch finds none.\n")


def test_all_parts_together_have_time():
    assert list(gpu.PARTS) == ["kernels", "tests", "sanitizer", "speed", "training", "large", "dali", "two"]
    assert sum(part.seconds for part in gpu.PARTS.values()) <= gpu.WHOLE == 8 * 60


def test_no_failure_of_a_part_ends_another(tmp_path, monkeypatch, capsys):
    def run(part, limit, options):
        lines = capsys.readouterr().out.splitlines()
        assert lines[-1].startswith(f"{list(gpu.PARTS).index(part) + 1}/8 {part}, up to "), "said before it begins"
        if part != "kernels":
            assert len(figures_of(tmp_path)["parts"]) == list(gpu.PARTS).index(part), "written after every part"
        kind = {"tests": "failed", "dali": "skipped"}.get(part)
        return {"seconds": 1.0, **({kind: f"{part} has its reason"} if kind else {})}

    monkeypatch.setattr(gpu, "run_part", run)
    assert gpu.main(["--device", "cpu", "--out", str(tmp_path)]) == 0
    result = figures_of(tmp_path)
    assert list(result["parts"]) == list(gpu.PARTS)
    assert result["benchmark"] == "gpu-cpu"
    assert {"cpu", "torch"} <= result["hardware"].keys()
    out = capsys.readouterr().out
    assert "| tests: failed | tests has its reason |" in out
    assert "| dali: skipped | dali has its reason |" in out


def test_when_the_time_is_up_the_rest_is_left_out(tmp_path, monkeypatch):
    now, limits = [0.0], []

    def run(part, limit, options):
        limits.append(limit)
        now[0] += 200
        return {"seconds": 200}

    monkeypatch.setattr(gpu.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(gpu, "run_part", run)
    result = gpu.measure(SimpleNamespace(device="cpu", out=tmp_path, only=list(gpu.PARTS)))
    assert limits == [45, 75, 40], "no part has more than is left"
    assert [name for name, part in result["parts"].items() if part.get("failed") == "no time was left"] == list(
        gpu.PARTS
    )[3:]


SLEEP = "import time; time.sleep(77)"
ENDINGS = {
    "import os; os.abort()": r"exit code -6: no word of it",
    "raise RuntimeError('CUDA error: an illegal access')": r"exit code 1: RuntimeError: CUDA error: an illegal .*",
    f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', '{SLEEP}']); {SLEEP}": r"stopped after 3 s",
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_what_a_part_found_before_it_ended_is_kept(tmp_path, ending):
    said = f"print({gpu.MARK!r} + {json.dumps({'rate': 7})!r}, flush=True); "
    start = time.monotonic()
    problem, lines = gpu.limited([sys.executable, "-c", said + ending], 3, tmp_path)
    assert time.monotonic() - start < 30
    assert re.fullmatch(ENDINGS[ending], problem)
    assert lines == [gpu.MARK + '{"rate": 7}']
    asleep = [p for p in psutil.process_iter(["cmdline"]) if SLEEP in (p.info["cmdline"] or [])]
    assert not asleep, "what a part has started ends with it"


def test_a_part_runs_in_a_process_of_its_own():
    options = SimpleNamespace(device="cpu", small=True, data=None)
    found = gpu.run_part("kernels", 100, options)
    assert "failed" not in found, found
    assert all(case["equal_to_cpu"] for case in found["kernels"].values())
    assert found["machine"]["torch"] == torch.__version__
    assert found["seconds"] > 0


def test_kernels_are_launched_and_compared(lab, found):
    gpu_parts.kernels(lab)
    assert list(found["kernels"]) == ["views 16 px bfloat16", "views 16 px float32", "bank K=3 n=8 d=16"]
    assert all(case["equal_to_cpu"] and case["first_ms"] > 0 for case in found["kernels"].values())


def test_the_watched_process_says_what_it_has_launched(lab, capsys):
    gpu_parts.launches(lab)
    launched = ["launched views 16 px bfloat16", "launched views 16 px float32", "launched bank K=3 n=8 d=16"]
    assert capsys.readouterr().out.splitlines() == launched


def test_a_kernel_that_is_wrong_fails_the_part(lab, monkeypatch):
    ones = [torch.ones(2)]
    monkeypatch.setattr(gpu_parts, "kernel_cases", lambda lab: [("bad", lambda: [torch.zeros(2)], lambda: ones)])
    with pytest.raises(SystemExit, match="not what the CPU makes of it: bad"):
        gpu_parts.kernels(lab)


def test_the_marked_tests_are_run_and_told(lab, found, tmp_path, monkeypatch):
    (tmp_path / "tests").mkdir()
    (tmp_path / "pyproject.toml").write_text("[tool.pytest.ini_options]\nmarkers = ['gpu: needs a card']\n")
    lines = ["import pytest", "def test_other(): 1 / 0"]
    lines += [
        f"@pytest.mark.gpu\ndef test_{name}():\n    {body}" for name, body in (("good", "pass"), ("bad", "1 / 0"))
    ]
    (tmp_path / "tests/test_some.py").write_text("\n".join(lines))
    (tmp_path / "tests/test_abort.py").write_text("import os; os._exit(7)\n@pytest.mark.gpu\ndef test_it(): pass")
    (tmp_path / "tests/test_none.py").write_text("raise ImportError('not for a card')")
    monkeypatch.setattr(gpu_parts, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match=r"test_abort\.py: exit code 7: no word of it"):
        gpu_parts.marked_tests(lab)
    assert found["marked"] == {"failed": 1, "passed": 1}
    assert "FAILED tests/test_some.py::test_bad" in found["not_passed"][1]


@pytest.mark.parametrize(("code", "problem"), [(0, None), (9, "memcheck: ERROR SUMMARY: 1 error")])
def test_the_sanitizer_watches_a_process_that_launches_the_kernels(lab, found, tmp_path, monkeypatch, code, problem):
    program = tmp_path / "compute-sanitizer"
    program.write_text(
        f"#!/bin/sh\necho launched one\necho '========= ERROR SUMMARY: {code and 1} error'\n"
        f"echo $* >> {tmp_path}/asked\nexit {code}\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    if problem:
        with pytest.raises(SystemExit, match=problem):
            gpu_parts.sanitizer(lab)
    else:
        gpu_parts.sanitizer(lab)
    case = {"launched": ["one"], "exit_code": code, "summary": f"ERROR SUMMARY: {code and 1} error"}
    assert found["tools"] == {"memcheck": case, "racecheck": case}
    asked = (tmp_path / "asked").read_text().splitlines()
    assert [line.split()[1] for line in asked] == ["memcheck", "racecheck"]
    assert all("-m benchmarks.gpu --part launches --device cpu" in line for line in asked)


def test_what_is_not_there_is_skipped_with_a_word(lab, found, monkeypatch):
    monkeypatch.setattr(gpu_parts.shutil, "which", lambda *_, **__: None)
    gpu_parts.sanitizer(lab)
    assert found.pop("skipped") == "compute-sanitizer is not there"
    monkeypatch.setattr(gpu_parts, "find_spec", lambda name: None)
    gpu_parts.dali(lab)
    assert found.pop("skipped") == "DALI is not installed"
    gpu_parts.marked_tests(lab)
    assert found.pop("skipped") == "pytest is not installed"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    gpu_parts.two(lab._replace(device=torch.device("cuda", 0)))
    assert found.pop("skipped") == "there is one GPU"


def test_calls_and_bandwidth_are_measured(lab, monkeypatch):
    for name, case in {**gpu_parts.augment_times(lab), **gpu_parts.bank_times(lab)}.items():
        assert 0 < case["host_us"] <= case["device_us"], name
        assert case["bytes_per_s"] > 0
        assert case["bandwidth_share"] is None, "a CPU's is not known"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    assert gpu_parts.bandwidth(3.35e11) == {"bytes_per_s": 335_000_000_000, "bandwidth_share": 0.1}


def test_the_ways_to_run_a_step_are_settings_that_exist(lab):
    from semi_fast.config import load_settings

    real = lab._replace(scale=gpu_parts.REAL)
    found = {}
    for mode in (*gpu_parts.REAL.modes, "graph_alone"):
        settings = load_settings(["cifar10_lt", *gpu_parts.mode_settings(real, mode)]).compile
        found[mode] = settings.use, settings.mode, settings.graph
    assert found == {
        "eager": ("off", "default", "off"),
        "default": ("on", "default", "off"),
        "graph": ("on", "default", "step"),
        "reduce-overhead": ("on", "reduce-overhead", "off"),
        "graph_alone": ("off", "default", "step"),
    }


def test_a_graph_that_was_asked_for_and_not_recorded_fails_with_the_reason(lab, monkeypatch):
    from semi_fast.training.graph import HostRecorder

    def refuse(self, step):
        raise OSError("no such thing here")

    monkeypatch.setattr(HostRecorder, "record", refuse)
    with pytest.raises(RuntimeError, match=r"0 of 5 steps were replayed .* \(OSError: no such thing here\)"):
        gpu_parts.trained(lab, "graph", gpu_parts.train_folder(lab), lab.scale.rated, "ceiling=off")


def test_what_a_part_survived_is_raised_at_its_end():
    with gpu_parts.surviving(found := {"first": {"seconds": 1}}, "second"):
        raise RuntimeError("why")
    with pytest.raises(SystemExit, match=r"^second: RuntimeError: why$"):
        gpu_parts.raise_failed(found)


def test_a_long_evaluation_and_a_large_network(lab, found):
    gpu_parts.large(lab)
    assert found["evaluation"]["images"] == 20
    assert found["evaluation"]["seconds"] > 0
    assert found["training"]["images_per_s"] > 0
    assert found["training"]["replayed"] > 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor:UserWarning")  # of torch, on itself
def test_rates_of_steps_kernels_and_loaders(lab, found):
    gpu_parts.speed(lab)
    assert {name: "images_per_s" in case for name, case in found["steps"].items()} == {"eager": True, "graph": True}
    assert found["loaders"].keys() == {"resident"}, "there is no .beton"
    assert found["loaders"]["resident"]["images_per_s"] > 0
    assert found["paper"]["fused_ms"] > 0


@pytest.mark.slow
def test_whole_runs_and_how_far_a_graph_is_off(lab, found):
    gpu_parts.training(lab)
    assert all(case["images_per_s"] > 0 for case in found["runs"].values())
    assert found["equality"] == {name: {"loss": 0.0, "weights": 0.0} for name, _, _ in gpu_parts.PAIRS}


def test_the_table_has_what_was_found():
    case = {"images_per_s": 91_234.5, "step_ms": 2.8061, "ceiling_share": 0.973}
    parts = {
        "kernels": {"failed": "exit code 1: wrong", "seconds": 1},
        "tests": {"marked": {"passed": 21, "skipped": 1, "failed": 0}},
        "speed": {
            "steps": {"graph": case, "eager": {"failed": "OutOfMemoryError"}},
            "kernels": {"256 views of 32 px": {"device_us": 9.87, "bandwidth_share": 0.71}, "bank": {"failed": "no"}},
            "loaders": {"resident": {"images_per_s": 4_000_000}, "ffcv": {"failed": "UserError"}},
            "paper": {"fused_ms": 0.48, "separate_ms": 2.8},
        },
        "training": {
            "runs": {"semi": {**case, "device_mb": [2_100.4, 2_100.4]}},
            "equality": {"graph against eager": {"loss": 3e-4, "weights": 2e-3}, "compiled": {"failed": "no"}},
        },
        "large": {"evaluation": {"images": 50_000, "seconds": 3.21}},
    }
    hardware = {"gpu": "NVIDIA H100", "cpu": "some CPU", "torch": "2.11"}
    text = gpu.table({"parts": parts, "hardware": hardware, "commit": "abc"})
    assert text.splitlines()[2:] == [
        "| graph | 91,234 images/s, 2.81 ms a step, 97% of the bare model |",
        "| semi | 91,234 images/s, 2.81 ms a step, 97% of the bare model |",
        "| 256 views of 32 px | 9.9 µs, 71% of the memory's rate |",
        "| loader resident | 4,000,000 images/s |",
        "| least time of a step on paper | 0.48 ms fused, 2.8 ms not |",
        "| semi: memory | 2,100 MiB after a quarter, 2,100 at the end |",
        "| graph against eager | mean loss 0.0003 off, weights 0.002 |",
        "| evaluation of 50,000 images | 3.21 s |",
        "| tests on the card | 21 passed, 1 skipped |",
        "| kernels: failed | exit code 1: wrong |",
        "",
        f"Measured on NVIDIA H100; torch 2.11; commit abc. Others: {gpu.PUBLIC}.",
    ]
