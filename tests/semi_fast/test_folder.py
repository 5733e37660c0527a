"""Whether saved settings are those of the same run."""

from __future__ import annotations

import copy

import pytest
import yaml

from semi_fast.config import load_settings
from semi_fast.run.folder import choose_folder, differences


@pytest.fixture
def now():
    return load_settings(["digits_lt"]).model_dump()


def test_the_same_settings_do_not_differ_and_free_ones_may(now):
    assert differences(now, now) == []
    assert differences(now, {**now, "threads": 7, "keep": 9, "data": {**now["data"], "build": "something else"}}) == []


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("optim.lr=0.5", "optim.lr: now 0.03, saved 0.5"),
        ("method.tau=0.5", "method.tau: now 0.7, saved 0.5"),
        ("figure=best", "figure: now last, saved best"),
        ("data=other", "data.path: now data/digits-lt, saved other"),
    ],
)
def test_what_matters_is_named(now, override, line):
    assert differences(now, load_settings(["digits_lt", override]).model_dump()) == [line]


def test_a_setting_or_option_that_was_added_later_counts_as_its_default(now):
    old = copy.deepcopy(now)
    del old["ema"]["buffers"], old["optim"]["schedule"], old["net"]["raw_transitions"], old["protocol"]
    del old["method"]["alpha"], old["method"]["bank"], old["views"]["strong"]["ops_first"], old["start_from"]
    assert differences(now, old) == []
    changed = load_settings(["digits_lt", "method.alpha=0.1", "optim.schedule=cosine"]).model_dump()
    assert differences(changed, old) == [
        "method.alpha: now 0.1, saved 0.4",
        "optim.schedule: now cosine, saved cosine_7_16",
    ]


def test_a_setting_or_method_that_is_no_more_is_a_difference(now):
    assert differences(now, {**now, "gone": 3}) == ["gone: now None, saved 3"]
    other = {**now, "method": {"name": "forgotten"}}
    assert "method.name: now semi, saved forgotten" in differences(now, other)


def test_an_unfinished_run_of_an_older_version_is_gone_on_with(now, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "digits-lt-semi-seed0"
    folder.mkdir(parents=True)
    del now["optim"]["shrink"], now["method"]["beta"]
    (folder / "config.yaml").write_text(yaml.safe_dump(now))
    assert choose_folder(load_settings(["digits_lt"])).name == "digits-lt-semi-seed0"
    assert choose_folder(load_settings(["digits_lt", "method.beta=0.5"])).name == "digits-lt-semi-seed0-2"
    (folder / "config.yaml").write_text("broken: [")
    assert choose_folder(load_settings(["digits_lt"])).name == "digits-lt-semi-seed0-2"
