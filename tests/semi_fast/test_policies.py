"""View policies in settings files and on the command line."""

import re
from dataclasses import replace

import pytest
import yaml

from data_prep.errors import UserError
from pipelines import VIEWS, View
from semi_fast.config import load_settings
from semi_fast.observe.banner import help_text
from semi_fast.run.folder import differences

OWN = "views: {strong: {ops: [rotate, invert, solarize_add], n: 2, levels: [2, 8], probability: 0.25, cutout: 0.4}}\n"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("data: data/digits-lt\n" + OWN)
    return str(path)


def policy(*argv, view="strong") -> View:
    return load_settings(argv).views.policies()[view]


def test_without_settings_the_views_are_the_paper_s():
    assert load_settings([]).views.policies() == VIEWS


def test_a_file_says_a_policy_and_the_command_line_changes_it(file):
    own = View(ops=("rotate", "invert", "solarize_add"), n=2, levels=(2, 8), probability=0.25, cutout=0.4)
    assert policy(file) == own
    assert policy(file, "views.strong.n=3", "views.strong.levels=[1, 9]").n == 3
    assert policy(file, view="weak") == VIEWS["weak"]
    assert policy("views.weak.pad=0.25", view="weak") == View(pad=0.25)


def test_a_policy_can_be_named_and_then_changed(file):
    assert policy("views.strong=randaugment_3_4") == VIEWS["randaugment_3_4"]
    assert policy(file, "views.strong=randaugment_3_4") == VIEWS["randaugment_3_4"]  # what the file says is void
    assert policy("views.strong=randaugment_3_4", "views.strong.n=1").n == 1
    assert policy("views.strong={policy: weak, gray: 3}") == View(gray=3)
    assert policy("views.weak=weak_black", view="weak").border == "black"
    assert policy("views.weak=weak_photo", view="weak") == VIEWS["weak_photo"]
    photo = policy("views.strong=strong_photo", "views.strong.area=[0.08, 1]", "views.strong.jitter=[0, 0.2, 1]")
    assert photo == replace(VIEWS["strong_photo"], area=(0.08, 1), jitter=(0, 0.2, 1))


def test_a_saved_policy_is_read_back_and_is_part_of_what_must_agree(file, tmp_path):
    settings = load_settings([file])
    saved = tmp_path / "config.yaml"
    saved.write_text(yaml.safe_dump({"views": settings.model_dump()["views"]}))
    again = load_settings([str(saved)])
    assert again.views == settings.views
    found = differences(load_settings([file, "views.strong.n=3"]).model_dump(), settings.model_dump())
    assert found == ["views.strong.n: now 3, saved 2"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("views.strong.ops=[rotat]", "views.strong: Unknown operation 'rotat'. Did you mean 'rotate'?"),
        ("views.strong.border=refect", "views.strong: Unknown border 'refect'. Did you mean 'reflect'?"),
        ("views.strong=randaugment", "Unknown policy 'randaugment'. Did you mean 'randaugment_3_4'?"),
        ("views.stron.n=3", "Unknown view 'stron'. Did you mean 'strong'?"),
        ("views.strong.nn=3", "Unknown config key 'views.strong.nn'. Did you mean 'views.strong.n'?"),
        ("views.strong.n=two", "views.strong.n: input should be a valid integer, got 'two'."),
        ("views.strong.ops=rotate", "views.strong.ops: input should be a valid list, got 'rotate'."),
        ("views.strong.levels=[1,2,3]", "views.strong: A view's levels must be two whole numbers in 0..10"),
        ("views.strong.levels=[0.5,2]", "views.strong.levels.0: input should be a valid integer"),
        ("views.weak.area=[0.5, 1]", "views.weak: A view's pad must be 0 where there is an area, of which"),
        ("views.strong={policy: strong_photo, area: [1, 0.5]}", "A view's area must be two numbers above 0"),
        ("views.strong={policy: strong_photo, ratio: [0, 1]}", "A view's ratio must be two numbers above 0"),
        ("views.strong.jitter=[0.4]", "views.strong: A view's jitter must be three numbers within 0..1, got (0.4,)"),
        ("views.strong.area=0.5", "views.strong.area: input should be a valid list, got 0.5."),
        ("views.weak.n=2", "views.weak: A view's n must be 0 where there are no ops, got 2"),
        ("views.strong.probability=1.1", "views.strong: A view's probability must be within 0..1, got 1.1"),
        ("views.strong=3", "views.strong reads {key: value} or names a policy, got 3."),
        ("views=3", "views reads {view: {key: value}}, got 3."),
        ("views.strong.policy=[weak]", "Unknown policy '['weak']'."),
    ],
)
def test_mistakes_are_one_line(override, message):
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        load_settings([override])
    assert "\n" not in str(caught.value)


def test_help_lists_the_keys_of_a_view():
    text = help_text("")
    assert re.search(r"views\.strong\.n=2 ", text)
    assert re.search(r"views\.weak\.area=\[\] .*resized crop", text)
    assert re.search(r"^Policies, .*views\.strong=NAME: plain, .*weak_photo, strong_photo$", text, re.MULTILINE)
