"""Settings: merging, short forms, and every kind of mistake."""

from pathlib import Path

import pytest

from data_prep.errors import UserError
from data_prep.recipes.catalog import long_tail
from semi_fast.config import CONFIGS, load_settings, parse_override, resolve


def test_defaults_are_the_digits_setting():
    cfg = load_settings([])
    assert cfg.data.path == "data/digits-lt"
    assert cfg.method.name == "semi"
    assert cfg.method.options["tau"] == 0.7


def test_overrides_win_in_order_and_short_forms_work():
    cfg = load_settings(
        [
            "cifar10_lt",
            "method=fixmatch",
            "steps=10",
            "steps=20",
            "optim.lr=5e-2",
            "data=elsewhere",
            "net.bn_momentum=0.1",
        ]
    )
    assert (cfg.method.name, cfg.steps, cfg.optim.lr, cfg.data.path) == ("fixmatch", 20, 0.05, "elsewhere")
    assert (cfg.net.name, cfg.net.bn_momentum) == ("wrn28_2", 0.1)


def test_method_defaults_apply_to_their_method_alone(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("method_defaults: {semi: {tau: 0.8}, fixmatch: {tau: 0.9}}\n")
    assert load_settings([str(path)]).method.options["tau"] == 0.8
    assert load_settings([str(path), "method=fixmatch"]).method.options["tau"] == 0.9
    assert load_settings([str(path), "method.tau=0.6"]).method.options["tau"] == 0.6


def test_on_and_off_are_words():
    assert load_settings(["compile=off", "wandb=off"]).compile.use == "off"
    assert load_settings(["compile=on"]).compile.use == "on"


def test_compile_is_a_section_with_a_short_form():
    assert load_settings([]).compile.model_dump() == {"use": "auto", "mode": "default"}
    assert load_settings(["compile.mode=reduce-overhead"]).compile.use == "auto"
    both = load_settings(["compile=on", "compile.mode=max-autotune"]).compile
    assert (both.use, both.mode) == ("on", "max-autotune")
    with pytest.raises(UserError, match=r"compile\.mode: .*'reduce-overhead'.*got 'fast'"):
        load_settings(["compile.mode=fast"])
    with pytest.raises(UserError, match="mode=reduce-overhead has no effect with compile=off"):
        load_settings(["compile=off", "compile.mode=reduce-overhead"])


def test_a_resolved_config_reads_back_as_itself(tmp_path):
    import yaml

    cfg = load_settings(["method.tau=0.8"])
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(cfg.model_dump()))
    assert load_settings([str(path)]) == cfg


def test_every_setting_file_is_valid():
    files = sorted(CONFIGS.glob("*.yaml"))
    assert files
    for file in files:
        for method in ("semi", "fixmatch", "supervised"):
            assert load_settings([str(file), f"method={method}"]).method.name == method


def test_the_folders_of_the_setting_files_are_what_the_build_makes_by_default():
    made = (long_tail("digits-lt"), long_tail("cifar10-lt"), long_tail("cifar10-lt", n1=1500, m1=3000))
    names = {recipe.folder_name() for recipe in made}
    long_tailed = [load_settings([str(file)]).data.path for file in CONFIGS.glob("*_lt*.yaml")]
    assert names <= {Path(path).name for path in long_tailed}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["step=5"], "Unknown config key 'step'. Did you mean 'steps'?"),
        (["optim.learning_rate=5"], "Unknown config key 'optim.learning_rate'"),
        (["method=fixmach"], "Unknown method 'fixmach'. Did you mean 'fixmatch'?"),
        (["method.tua=0.5"], "Did you mean 'tau'?"),
        (["method.tau=high"], "method.tau"),
        (["method.tau=1.5"], "method.tau"),
        (["steps=many"], "steps: input should be a valid integer, got 'many'."),
        (["steps=true"], "steps: input should be a valid integer, got True."),
        (["seed=1.5"], "seed: input should be a valid integer"),
        (["optim.nesterov=1"], "optim.nesterov: input should be a valid boolean, got 1."),
        (["steps=0"], "steps: input should be greater than or equal to 1, got 0."),
        (["batch=1"], "batch: input should be greater than or equal to 2, got 1."),
        (["optim.lr=-1"], "optim.lr: input should be greater than 0, got -1."),
        (["optim.lr=.nan"], "optim.lr: input should be"),
        (["precision=fp8"], "precision: input should be 'auto', 'bf16', 'fp16' or 'fp32', got 'fp8'."),
        (["cifar10"], "Unknown settings file 'cifar10'. Did you mean 'cifar10_lt'?"),
        (["nowhere/cifar.yaml"], "No settings file at nowhere/cifar.yaml."),
        (["steps"], "Unknown settings file 'steps'."),
        (["digits_lt", "steps"], "An override reads key=value (optim.lr=0.1), got 'steps'."),
        (["optim=5"], "optim: input should be"),
        (["steps=[1"], "The value of steps is not valid YAML: '[1'."),
    ],
)
def test_mistakes_are_one_clear_line(arguments, message):
    with pytest.raises(UserError) as caught:
        load_settings(arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_numbers_may_be_written_in_any_way_and_folders_may_be_numbers():
    cfg = load_settings(["steps=1e5", "optim.lr=1", "run_dir=2024", "data=127"])
    assert (cfg.steps, cfg.optim.lr, cfg.run_dir, cfg.data.path) == (100_000, 1.0, "2024", "127")


@pytest.mark.parametrize(
    ("defaults", "message"),
    [
        ("5", "method_defaults reads"),
        ("{semii: {}}", "Did you mean 'semi'?"),
        ("{semi: {tua: 1}}", "Did you mean 'tau'?"),
    ],
)
def test_method_defaults_are_checked_for_every_method(tmp_path, defaults, message):
    path = tmp_path / "mine.yaml"
    path.write_text(f"method: supervised\nmethod_defaults: {defaults}\n")
    with pytest.raises(UserError) as caught:
        load_settings([str(path)])
    assert message in str(caught.value)


@pytest.mark.parametrize("content", ["- a list", "steps: [", "text"])
def test_broken_setting_files_are_refused(tmp_path, content):
    path = tmp_path / "broken.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=r"broken\.yaml"):
        load_settings([str(path)])


def test_overrides_nest():
    assert parse_override("a.b.c=1e-3") == {"a": {"b": {"c": 0.001}}}
    assert parse_override("net=resnet50") == {"net": {"name": "resnet50"}}


def test_resolve_completes_method_options():
    assert resolve({"method": "supervised"}).method.name == "supervised"


def test_config_folder_is_the_projects(root: Path):
    assert root / "configs" == CONFIGS


@pytest.mark.parametrize(
    "argv", [["--quiet"], ["digits_lt", "--quiet", "steps=5"], ["--quiet", "digits_lt", "steps=5"]]
)
def test_quiet_may_stand_anywhere(argv):
    settings = load_settings(argv)
    assert settings.quiet == "on"
    assert settings.steps == (5 if "steps=5" in argv else load_settings([]).steps)
    assert load_settings(["quiet=off"]).quiet == "off"
