"""The parts of a report on their own: reading logs, and figures of very many classes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines import Info
from pipelines.reading import DataFacts
from semi_fast.parts.figures import Figure
from semi_fast.reporting.class_figures import (
    CELLS,
    confused_pairs,
    confusion_figure,
    count_figure,
    dots,
    merged,
    moving_mean,
)
from semi_fast.reporting.curves_over_time import Curve, declared_figures, over_steps, throughput_figures
from semi_fast.reporting.drawing import BAND, WIDTH, table_bytes
from semi_fast.reporting.rundata import RunData, confusion_of, label
from semi_fast.reporting.runlog import RunLog, read_log, series


def run_of(classes: int, tmp_path) -> RunData:
    """A run on a long-tailed set of many classes whose sizes are not in order."""
    counts = np.random.default_rng(0).permutation(np.geomspace(500, 5, classes).astype(int))
    names = tuple(f"class number {k} of the set" for k in range(classes))
    info = Info(*[1] * len(Info._fields))._replace(
        name="many", num_classes=classes, class_names=names, labeled_counts=tuple(counts.tolist()), fingerprint="0" * 64
    )
    facts = DataFacts(info, {}, "", "", "box", None)
    return RunData(tmp_path, {}, RunLog([], [], []), None, facts)


@pytest.mark.parametrize("classes", [2, 10, 40, 127, 1000])
def test_figures_of_many_classes_stay_of_a_size(classes, tmp_path):
    run = run_of(classes, tmp_path)
    random = np.random.default_rng(1)
    counts = random.integers(0, 30, (classes, classes)) + 100 * np.eye(classes, dtype=int)
    confusion = confusion_figure(run, counts, "confusion", "Confusion")
    figures = [confusion, count_figure(run), dots("d", "D", run.class_names, {"a": counts.diagonal()}, "%")]
    for figure in figures:
        height = float(figure.svg.split('viewBox="')[1].split('"')[0].split()[3])
        assert height < 1000, "more than a screen or two of a phone"
        assert len(figure.svg) < 700_000
    header, *rows = confusion.files["csv"].decode().splitlines()
    assert len(rows) == classes  # the file has all, whatever is drawn
    assert header.count(",") == classes
    pairs = confused_pairs(run, counts)
    assert pairs is not None
    assert len(pairs.rows) <= 10


@given(st.integers(1, 60), st.integers(1, 20))
def test_merged_confusion_keeps_every_image(classes, most):
    counts = np.random.default_rng(classes).integers(0, 9, (classes, classes)).astype(float)
    shares, step = merged(counts, most)
    assert len(shares) <= most
    assert step == -(-classes // most)
    rows = shares[~np.isnan(shares[:, 0])].sum(1)
    np.testing.assert_allclose(rows, 1)


def test_classes_stand_by_their_labeled_images(tmp_path):
    run = run_of(12, tmp_path)
    counts = [run.info.labeled_counts[k] for k in run.order]
    assert counts == sorted(counts, reverse=True)
    assert CELLS >= 127


def test_a_single_evaluation_is_a_dot():
    one = over_steps("one", "One", [Curve("a", np.array([5.0]), np.array([50.0]), "#1f6fb2", {})], "%")
    two = over_steps("two", "Two", [Curve("a", np.array([5.0, 6.0]), np.array([50.0, 51]), "#1f6fb2", {})], "%")
    assert one is not None
    assert two is not None
    filled = 'style="fill: var(--c0)'  # a marker; lines have no fill
    assert filled in one.svg
    assert filled not in two.svg
    assert over_steps("none", "None", [None], "%") is None


def test_a_drawing_has_no_title_on_the_page_and_one_in_its_file():
    drawn = over_steps("x", "My title", [Curve("a", np.arange(3.0), np.arange(3.0), "#1f6fb2", {})], "%")
    assert drawn is not None
    assert "My title" in drawn.files["svg"].decode()
    assert "My title" not in drawn.svg
    assert f'viewBox="0 {BAND} {WIDTH} ' in drawn.svg


def test_a_log_is_read_whatever_is_in_it(tmp_path):
    path = tmp_path / "log.jsonl"
    lines = [
        '{"kind": "train", "step": 10, "loss/total": 1.0, "prior": [0.5, 0.5]}',
        '{"kind": "train", "step": 20, "loss/total": NaN, "prior": [0.25, 0.75]}',
        '{"kind": "train", "step": 20, "loss/total": 2.0, "prior": [0.25, null]}',
        '["no object"]',
        '{"kind": "eval", "step": "five"}',
        '{"kind": "eval", "step": 20, "eval/accuracy": Infinity}',
        '{"kind": "tra',
    ]
    path.write_text("\n".join(lines))
    log = read_log(path)
    assert [e["step"] for e in log.train] == [10, 20]
    steps, values = series(log.train, "loss/total")
    assert steps.tolist() == [10, 20]
    assert values.tolist() == [1.0, 2.0]  # the last line of a step counts
    assert np.isnan(series(log.evaluations, "eval/accuracy")[1]).all()
    assert any("3 lines of the log are damaged" in problem and "line 4" in problem for problem in log.problems)
    assert read_log(tmp_path / "none.jsonl").problems
    path.write_text("")
    assert read_log(path).problems == ["The log is empty so far."]


def test_a_share_above_the_ceiling_is_called_too_high():
    def caption(*shares):
        lines = [{"kind": "train", "step": i, "throughput/ceiling_share": s} for i, s in enumerate(shares)]
        (drawn,) = [figure for figure in throughput_figures(lines) if figure and figure.name == "ceiling"]
        return drawn.caption

    assert caption(0.8, 1.0) == "The bare model was timed once, at the start."
    assert "these shares are too high" in caption(0.8, 1.01, float("nan"))


def test_declared_figures_are_drawn_by_group_and_unit():
    declared = (
        Figure("made_up/one", "share", "The first."),
        Figure("made_up/two", "share", "The second."),
        Figure("made_up/rate", "", "A number."),
        Figure("made_up/unlogged", "percent", "Not in the log."),
        Figure("classes", "distribution", "No curve."),
    )
    lines = [{"step": i, "made_up/one": 0.5, "made_up/two": i / 9, "made_up/rate": 7 * i} for i in range(1, 4)]
    shares, numbers = declared_figures(lines, declared)
    assert (shares.name, shares.title) == ("method_made_up_share", "Made up")
    assert shares.caption == "one: The first. two: The second."
    assert [row.split(",")[0] for row in shares.files["csv"].decode().splitlines()[1:]] == ["one"] * 3 + ["two"] * 3
    assert (numbers.name, numbers.title) == ("method_made_up_number", "Made up rate")
    assert numbers.files["csv"].decode().splitlines()[1:] == ["rate,1,7.0", "rate,2,14.0", "rate,3,21.0"]


def test_small_helpers():
    assert label("line\nbreak") == "line break"
    assert label("x" * 30) == "x" * 17 + "…"
    assert label(" \t") == "(no name)"
    assert confusion_of(np.array([0, 1, -1]), np.array([0, 0, 1]), 2).tolist() == [[1, 0], [1, 0]]
    np.testing.assert_allclose(moving_mean(np.array([1.0, np.nan, 4.0]), 3), [1, 2.5, 4])
    assert table_bytes(["a", "b"], [(1, None), (float("nan"), "x,y")]) == b'a,b\n1,\n,"x,y"\n'
