"""Settings: merging, short forms, and every kind of mistake."""

import functools
import shlex
from pathlib import Path

import pytest
import typer
import yaml

from data_prep import build
from data_prep.errors import UserError
from data_prep.recipes.catalog import recipe
from semi_fast import config
from semi_fast.config import (
    CONFIGS,
    Settings,
    flatten,
    load_settings,
    parse_override,
    read_run_config,
    read_settings_file,
    resolve,
)
from semi_fast.methods import check_options, method_names

PROTOCOLS = sorted(path.stem for path in CONFIGS.glob("protocol_*.yaml"))
DATA_FILES = sorted(path.stem for path in CONFIGS.glob("*.yaml") if path.stem not in PROTOCOLS)


@pytest.fixture
def files_read_once(monkeypatch):
    """Reading takes most of the time of settings; what is read is not changed."""
    monkeypatch.setattr(config, "read_settings_file", functools.cache(read_settings_file))


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
    assert load_settings([]).compile.model_dump() == {"use": "auto", "mode": "default", "graph": "auto"}
    assert load_settings(["compile.mode=reduce-overhead"]).compile.use == "auto"
    both = load_settings(["compile=on", "compile.mode=max-autotune"]).compile
    assert (both.use, both.mode) == ("on", "max-autotune")
    with pytest.raises(UserError, match=r"compile\.mode: .*'reduce-overhead'.*got 'fast'"):
        load_settings(["compile.mode=fast"])
    with pytest.raises(UserError, match="mode=reduce-overhead has no effect with compile=off"):
        load_settings(["compile=off", "compile.mode=reduce-overhead"])


def test_a_resolved_config_reads_back_as_itself(tmp_path):
    cfg = load_settings(["method.tau=0.8"])
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(cfg.model_dump()))
    assert load_settings([str(path)]) == cfg


def test_files_are_merged_in_order_and_then_the_overrides(tmp_path):
    for name, text in (
        ("one", "steps: 1\nbatch: 2\noptim: {lr: 1.0, momentum: 0.1}\nmethod_defaults: {semi: {tau: 0.1, alpha: 0.1}}"),
        ("two", "batch: 3\noptim: {lr: 2.0}\nmethod_defaults: {semi: {tau: 0.2}}"),
    ):
        (tmp_path / f"{name}.yaml").write_text(text)
    one, two = str(tmp_path / "one.yaml"), str(tmp_path / "two.yaml")
    cfg = load_settings([one, "seed=5", two, "method.alpha=0.3"])
    assert (cfg.steps, cfg.batch, cfg.seed, cfg.optim.lr, cfg.optim.momentum) == (1, 3, 5, 2.0, 0.1)
    assert (cfg.method.options["tau"], cfg.method.options["alpha"]) == (0.2, 0.3)
    turned = load_settings([two, one])
    assert (turned.batch, turned.optim.lr, turned.method.options["tau"]) == (2, 1.0, 0.1)
    assert load_settings([one, two, "batch=9", "optim.lr=3"]).batch == 9


def test_settings_may_depend_on_the_method_and_the_network(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "steps: 7\nwhen:\n  method=supervised: {steps: 9, optim: {lr: 0.1}}\n  net=resnet50: {net: {bn_momentum: 0.5}}"
    )
    assert load_settings([str(path)]).steps == 7
    assert load_settings([str(path), "method=supervised"]).optim.lr == 0.1
    assert load_settings([str(path), "method=supervised", "optim.lr=0.2"]).optim.lr == 0.2
    assert load_settings([str(path), "net=resnet50"]).net.bn_momentum == 0.5
    later = tmp_path / "later.yaml"
    later.write_text("optim: {lr: 0.3}")
    assert load_settings([str(path), str(later), "method=supervised"]).optim.lr == 0.3


@pytest.mark.parametrize("file", DATA_FILES)
def test_a_data_file_says_how_its_folder_is_built(file):
    data = load_settings([file]).data
    name, *options = shlex.split(data.build)
    command = typer.main.get_command(build.app).get_command(None, name)
    given = command.make_context(name, options).params
    split = {key: given.get(key) for key in ("n1", "m1", "gamma_l", "gamma_u") if given.get(key) is not None}
    assert Path(data.path) == Path("data") / recipe(name, **split, resolution=given["res"]).folder_name()


def test_another_folder_is_not_built_by_the_file_s_command(tmp_path):
    assert load_settings(["cifar10_lt", "data=elsewhere"]).data.build is None
    assert load_settings(["cifar10_lt", "data.path=elsewhere"]).data.build is None
    assert load_settings(["cifar10_lt", "data.backend=ffcv"]).data.build is not None
    given = load_settings(["cifar10_lt", "data={path: elsewhere, build: digits-lt --out elsewhere}"]).data
    assert given.build == "digits-lt --out elsewhere"


@pytest.mark.parametrize("file", sorted(path.stem for path in CONFIGS.glob("*.yaml")))
def test_data_files_repeat_no_default_and_protocols_leave_no_value_open(file):
    said = flatten(yaml.safe_load((CONFIGS / f"{file}.yaml").read_text()))
    said = {key: value for key, value in said.items() if not key.startswith(("method_defaults", "when", "data"))}
    default = flatten(Settings().model_dump())
    if file in PROTOCOLS:
        sections = [key for key in default if key.startswith(("optim.", "ema."))]
        unread = {"optim.nesterov"} if said["optim.name"].startswith("adam") else set()
        expected = {*sections, "steps", "batch", "mu", "eval_every", "figure", "net.bn_momentum", "protocol"} - unread
        assert expected <= said.keys()
    else:
        assert not {key for key, value in said.items() if key != "net.bn_momentum" and default[key] == value}


# The five protocols behind the published figures, and the project's own, a row each.
TABLE = {
    "P-DASO": "steps=250000 batch=64 mu=2 optim.name=sgd optim.lr=0.03 optim.momentum=0.9 optim.nesterov=true "
    "optim.schedule=constant optim.warmup=0 optim.weight_decay=0.0005 optim.decay_all=true optim.shrink=0 "
    "ema.decay=0.999 ema.warmup=true ema.buffers=averaged net.bn_momentum=0.1 net.raw_transitions=false "
    "views.weak.border=reflect views.strong.n=2 views.strong.levels=[1,9] views.strong.probability=0.5 "
    "views.strong.cutout=0.5 views.strong.gray=127 eval_every=500 figure=median20",
    "P-ADAM": "steps=250000 batch=64 mu=1 optim.name=adam optim.lr=0.002 optim.momentum=0.9 optim.schedule=constant "
    "optim.warmup=0 optim.weight_decay=0 optim.shrink=0.02 ema.decay=0.999 ema.warmup=false ema.buffers=averaged "
    "views.weak.border=black views.strong.border=black views.strong.n=3 views.strong.levels=[4,4] "
    "views.strong.ops_first=true views.strong.cutout=0.5 views.strong.gray=0 eval_every=500 figure=mean20",
    "P-ACR": "steps=250000 batch=64 mu=1 optim.name=sgd optim.lr=0.03 optim.momentum=0.9 optim.nesterov=true "
    "optim.schedule=cosine_7_16 optim.warmup=0 optim.weight_decay=0.0005 optim.decay_all=false optim.shrink=0 "
    "ema.decay=0.999 ema.warmup=false ema.buffers=copied net.bn_momentum=0.001 net.raw_transitions=true "
    "views.weak.border=reflect views.strong.n=2 views.strong.cutout=0.5 eval_every=500 figure=mean20",
    "P-CREST": "steps=393216 batch=64 mu=7 optim.name=sgd optim.lr=0.03 optim.momentum=0.9 optim.nesterov=true "
    "optim.schedule=cosine_1_16 optim.warmup=0 optim.weight_decay=0.0005 optim.shrink=0 ema.decay=0.999 "
    "ema.warmup=false ema.buffers=copied net.bn_momentum=0.001 net.raw_transitions=false views.strong.cutout=0.5 "
    "eval_every=1024 figure=last",
    "P-USB": "steps=262144 batch=64 mu=2 optim.name=sgd optim.lr=0.03 optim.momentum=0.9 optim.schedule=cosine_7_16 "
    "optim.warmup=0 optim.weight_decay=0.0005 optim.shrink=0 ema.decay=0.999 ema.warmup=false net.bn_momentum=0.001 "
    "net.raw_transitions=true views.strong.n=3 eval_every=1024 figure=best",
    "P-FAST": "steps=25000 batch=32 mu=1 optim.name=muon optim.lr=0.05 optim.momentum=0.9 optim.nesterov=true "
    "optim.schedule=cosine optim.warmup=0.05 optim.weight_decay=0.0005 optim.shrink=0 ema.decay=0.99 ema.warmup=false "
    "net.bn_momentum=0.1 net.raw_transitions=false views.strong.cutout=0.5 eval_every=500 figure=last",
    "P-FINETUNE": "steps=10000 batch=32 mu=2 optim.name=adamw optim.lr=0.0005 optim.schedule=cosine optim.warmup=0.05 "
    "optim.weight_decay=0.05 optim.layer_decay=0.75 optim.shrink=0 ema.decay=0.999 ema.warmup=true "
    "ema.buffers=averaged net.bn_momentum=0.1 net.raw_transitions=false net.freeze=0 eval_every=500 figure=last "
    "views.weak.area=[0.5,1.0] views.strong.area=[0.2,1.0] views.strong.jitter=[0.4,0.4,0.4] views.strong.cutout=0.5",
}
STRONG_VIEWS = {"P-DASO": 1, "P-ADAM": 2, "P-ACR": 2, "P-CREST": 1, "P-USB": 1, "P-FAST": 1, "P-FINETUNE": 1}


@pytest.mark.parametrize("file", PROTOCOLS)
@pytest.mark.usefixtures("files_read_once")
def test_a_protocol_has_the_published_values_on_every_data_set_and_method(file):
    name = f"P-{file.removeprefix('protocol_').upper()}"
    cfg = load_settings(["cifar10_lt", file, "method=fixmatch"])
    assert cfg.protocol == name
    assert cfg.method.options["strong_views"] == STRONG_VIEWS[name]
    values = flatten(cfg.model_dump())
    published = dict(item.split("=") for item in TABLE[name].split())
    assert {key: values[key] for key in published} == {key: yaml.safe_load(text) for key, text in published.items()}
    for data in DATA_FILES:
        for method in method_names():
            assert load_settings([data, file, f"method={method}"]).protocol == name


def test_supervised_has_its_own_schedule_under_daso():
    optim = load_settings(["cifar10_lt", "protocol_daso", "method=supervised"]).optim
    assert (optim.lr, optim.schedule, optim.warmup * 250_000) == (0.1, "milestones", 6_250)
    assert [[round(share * 250_000), factor] for share, factor in optim.milestones] == [
        [199_999, 0.01],
        [225_000, 0.01],
    ]
    assert load_settings(["cifar10_lt", "protocol_daso", "method=fixmatch"]).optim.schedule == "constant"


def test_cdmad_has_its_own_batch_and_optimizer_under_adam():
    cfg = load_settings(["cifar10_lt", "protocol_adam", "method=cdmad"])
    assert (cfg.batch, cfg.mu, cfg.optim.lr, cfg.optim.shrink, cfg.steps) == (32, 2, 0.0015, 0.04, 250_000)
    assert cfg.protocol == "P-ADAM"
    changed = load_settings(["cifar10_lt", "protocol_adam", "method=cdmad", "batch=64"])
    assert changed.protocol == "P-ADAM (changed: batch)"
    assert load_settings(["cifar10_lt", "protocol_adam", "method=cdmad", "batch=16"], 2).protocol == "P-ADAM"


def test_supervised_reports_its_raw_weights_under_daso():
    cfg = load_settings(["cifar10_lt", "protocol_daso", "method=supervised"])
    assert (cfg.method.options["weights"], cfg.protocol) == ("raw", "P-DASO")


@pytest.mark.parametrize(
    ("protocol", "views"), [("daso", 1), ("adam", 2), ("acr", 2), ("crest", 1), ("usb", 1), ("fast", 1)]
)
@pytest.mark.usefixtures("files_read_once")
def test_a_protocol_sets_the_strong_views_of_every_method_that_has_them(protocol, views):
    file = read_settings_file(f"protocol_{protocol}")
    for name in method_names():
        if "strong_views" in check_options(name, {}):
            cfg = load_settings(["cifar10_lt", f"protocol_{protocol}", f"method={name}"])
            assert cfg.method.options["strong_views"] == file.method_defaults.get(name, {}).get("strong_views", views)
            changed = load_settings(["cifar10_lt", f"protocol_{protocol}", f"method={name}", "method.strong_views=5"])
            assert changed.protocol == f"{cfg.protocol} (changed: method.strong_views)"


def test_resnet50_keeps_its_batchnorm_momentum():
    protocols = [path.stem for path in CONFIGS.glob("protocol_*.yaml")]
    for files in (
        ["imagenet127_32"],
        *(["imagenet127_64", name] for name in protocols),
        ["protocol_acr", "net=resnet50"],
    ):
        net = load_settings(files).net
        assert (net.name, net.bn_momentum, net.raw_transitions) == ("resnet50", 0.1, False)


def test_a_protocol_alone_is_laid_over_the_default():
    cfg = load_settings(["protocol_acr"])
    assert (cfg.data.path, cfg.net.name, cfg.steps) == ("data/digits-lt", "wrn10_1", 250_000)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["cifar10_lt"], ""),
        (["cifar10_lt", "optim.lr=0.1"], ""),
        (["protocol_acr", "seed=3", "data=x", "threads=1", "save_every=7", "log_every=7", "run_dir=x"], "P-ACR"),
        (["protocol_acr", "optim.lr=0.03", "steps=250000"], "P-ACR"),
        (["protocol_acr", "optim.lr=0.1", "steps=9"], "P-ACR (changed: optim.lr, steps)"),
        (["protocol_acr", "views.strong.n=3"], "P-ACR (changed: views.strong.n)"),
        (["protocol_acr", "eval_every=50", "ema.decay=0.99"], "P-ACR (changed: ema.decay, eval_every)"),
        (["protocol_crest", "eval_every=50"], "P-CREST"),  # its figure is the last one
        (["protocol_crest", "eval_every=50", "figure=best"], "P-CREST (changed: eval_every, figure)"),
        (["protocol_acr", "method=fixmatch", "method.tau=0.9"], "P-ACR"),
        (["protocol_acr", "method=fixmatch", "method.strong_views=1"], "P-ACR (changed: method.strong_views)"),
        (["protocol_daso", "method=supervised", "optim.lr=0.03"], "P-DASO (changed: optim.lr)"),
        (["protocol_acr", "digits_lt"], "P-ACR (changed: ema.decay, figure, net.bn_momentum, steps)"),
        (["protocol_acr", "protocol_daso"], "P-DASO"),
    ],
)
def test_no_run_claims_a_protocol_that_it_does_not_follow(arguments, name):
    assert load_settings(arguments).protocol == name


def test_a_protocol_asks_for_the_batch_of_all_processes(tmp_path):
    claimed = {
        (batch, processes): load_settings(["protocol_acr", f"batch={batch}"], processes).protocol
        for batch, processes in [(64, 1), (8, 1), (8, 8), (64, 8)]
    }
    assert claimed == {
        (64, 1): "P-ACR", (8, 1): "P-ACR (changed: batch)", (8, 8): "P-ACR", (64, 8): "P-ACR (changed: batch)",
    }  # fmt: skip
    assert load_settings(["protocol_acr"], 8).batch == 64
    of_eight = tmp_path / "config.yaml"
    of_eight.write_text(yaml.safe_dump(load_settings(["protocol_acr", "batch=8"], 8).model_dump()))
    assert [load_settings([str(of_eight)], n).protocol for n in (1, 8)] == ["P-ACR (changed: batch)", "P-ACR"]


def test_a_saved_protocol_keeps_its_changes_and_gains_further_ones(tmp_path):
    cfg = load_settings(["protocol_acr", "optim.lr=0.1"])
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(cfg.model_dump()))
    saved = str(tmp_path / "config.yaml")
    assert load_settings([saved, "seed=4"]).protocol == cfg.protocol == "P-ACR (changed: optim.lr)"
    assert load_settings([saved, "steps=9"]).protocol == "P-ACR (changed: optim.lr, steps)"
    assert resolve(read_run_config(tmp_path)) == cfg


def test_a_run_s_config_that_cannot_be_read_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"is no run's folder \(config\.yaml is missing\)"):
        read_run_config(tmp_path)
    for content, message in (
        (b"- 1", "must hold"),
        (b"5", "not valid"),
        (b"a: [", "not valid"),
        (b"\xff", "not valid"),
    ):
        (tmp_path / "config.yaml").write_bytes(content)
        with pytest.raises(UserError, match=message) as caught:
            read_run_config(tmp_path)
        assert "\n" not in str(caught.value)
    (tmp_path / "config.yaml").unlink()
    (tmp_path / "config.yaml").mkdir()
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        read_run_config(tmp_path)


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
        (["digits_lt", "steps"], "Unknown settings file 'steps'."),
        (["optim..lr=1"], "An override reads key=value (optim.lr=0.1), got 'optim..lr=1'."),
        (["=1"], "An override reads key=value (optim.lr=0.1), got '=1'."),
        (["protocol_dasso"], "Unknown settings file 'protocol_dasso'. Did you mean 'protocol_daso'?"),
        (["protocol=P-ACR"], "protocol is said by the settings file that sets its values"),
        (["optim.name=sdg"], "optim.name: input should be 'sgd', 'muon', 'adam' or 'adamw', got 'sdg'."),
        (["optim.name=muon", "optim.momentum=0"], "optim: muon orthogonalizes its momentum, got momentum=0"),
        (["optim.schedule=milestones"], "optim: schedule=milestones and milestones go together"),
        (["ema_decay=0.9"], "Unknown config key 'ema_decay'. Did you mean 'ema.decay'?"),
        (["figure=median"], "figure: input should be 'last', 'best', 'mean20' or 'median20', got 'median'."),
        (["start_weights=ema"], "start_weights: input should be 'averaged' or 'raw', got 'ema'."),
        (["method=[1]"], "Unknown method '[1]'."),
        (["data=a${b"], "The value of data is not valid YAML: 'a${b'. Quote it."),
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


@pytest.mark.parametrize("when", ["5", "{data=x: {}}", "{method=fixmach: {}}", "{net=: {}}", "{method=semi: 5}"])
def test_conditions_are_checked(tmp_path, when):
    path = tmp_path / "mine.yaml"
    path.write_text(f"when: {when}\n")
    with pytest.raises(UserError, match=r"when|Did you mean 'fixmatch'"):
        load_settings([str(path)])


@pytest.mark.parametrize("content", ["- a list", "steps: [", "5", "steps: 1\nsteps: 2"])
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
