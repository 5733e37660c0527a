"""Settings of a run: YAML files of `configs/` merged in order, then `key=value` overrides; checked first of all.

A settings file holds settings, and may hold two tables besides:

    method_defaults: {semi: {warmup_epochs: 2}}       options that apply when that method is chosen; under "*", to every
                                                      method that has them
    when: {net=resnet50: {net: {bn_momentum: 0.1}}}   settings that apply when that method or network is chosen
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from yaml import YAMLError

from data_prep.errors import UserError, unknown
from semi_fast.methods import check_options, method_class
from semi_fast.nets.backbone import PREFIX
from semi_fast.nets.weights import PRETRAINED
from semi_fast.policies import ViewsSettings, complete_views

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
DEFAULT_CONFIG = "digits_lt"
SEEDS = 2**31  # those there are
PROTOCOL = "protocol_"  # a file whose name starts so says how to train, not on what
# What a protocol fixes: changing it after the protocol's file has set it is noted in the protocol's name.
PROTOCOL_KEYS = {"views", "net", "optim", "steps", "batch", "mu", "ema", "eval_every", "figure"}
# `method=semi` is short for `method.name=semi`.
SHORT_FORMS = {"data": "path", "method": "name", "net": "name", "compile": "use"}


def _word(value: Any) -> Any:
    # YAML 1.1 reads a bare on/off as a truth value; here they are words.
    return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value


def _text(value: Any) -> Any:
    # A folder may be named 2024, which YAML reads as a number.
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


Word = BeforeValidator(_word)
FolderName = Annotated[str, BeforeValidator(_text), Field(min_length=1)]
Milestone = Annotated[list[float], Field(min_length=2, max_length=2)]


class Section(BaseModel):
    """A group of settings: unknown keys are errors, values are not changed after the check."""

    # Strict: a word is no number and a truth value no count; an int still passes as a float.
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)


class DataSettings(Section):
    path: FolderName = Field("data/digits-lt", description="data folder, as data_prep/build.py writes it")
    build: str | None = Field(None, description="arguments of data_prep/build.py that make that folder")
    disjoint: bool | None = Field(
        None, description="whether a protocol's unlabeled images leave the labeled ones out; none: either"
    )
    backend: Literal["auto", "resident", "ffcv", "dali"] = Field(
        "auto", description="resident and ffcv give the same bits; dali augments by its own operators"
    )


class NetSettings(Section):
    name: str = Field("wrn28_2", description="wrn28_2, resnet50, wrn<depth>_<width>, or timm/<name>")
    bn_momentum: float = Field(0.001, gt=0, le=1, description="in PyTorch's sense; 0.1 for short runs")
    raw_transitions: bool = Field(False, description="of wrn: groups 2 and 3 start from features not normalized")
    weights: FolderName | None = Field(None, description="to start with: a safetensors file, or pretrained (of timm/)")
    sha256: str | None = Field(None, description="of that file; the run fills it in, and goes on with no other")
    stem: Literal["native", "small"] = Field("native", description="of timm/; small: stride 1, no max-pool, for 32 px")
    normalize: Literal["auto", "data", "weights"] = Field(
        "auto", description="of timm/, by whose mean and std; auto: those of the weights where net.weights is set"
    )
    freeze: int = Field(0, ge=0, description="groups of layers that are not trained, from the stem on")
    checkpointing: bool = Field(False, description="of timm/: activations computed again, for less memory")

    @model_validator(mode="after")
    def _checksum_is_of_a_file(self) -> NetSettings:
        if self.sha256 is not None and self.weights in (None, PRETRAINED):
            raise ValueError(f"sha256 is that of a file of weights, got weights={self.weights}; leave it out")
        return self

    def structure(self) -> dict[str, Any]:
        """The arguments of `build_net`: what the network is, not how it starts or what of it is trained."""
        normalize = self.normalize
        if normalize == "auto":
            normalize = "weights" if self.weights and self.name.startswith(PREFIX) else "data"
        keys = {"name", "bn_momentum", "raw_transitions", "stem", "checkpointing"}
        return {**self.model_dump(include=keys), "normalize": normalize}


class OptimSettings(Section):
    name: Literal["sgd", "muon", "adam", "adamw"] = Field("sgd", description="muon: of convolutions; sgd for the rest")
    lr: float = Field(0.03, gt=0, description="base learning rate")
    momentum: float = Field(0.9, ge=0, lt=1, description="of sgd and muon; the first beta of adam and adamw")
    nesterov: bool = Field(True, description="of sgd and muon")
    weight_decay: float = Field(5e-4, ge=0, description="added to the gradient; decoupled from it in adamw")
    decay_all: bool = Field(False, description="weight decay on biases and BatchNorm, too")
    shrink: float = Field(0.0, ge=0, description="weights, BatchNorm statistics x (1 - shrink * lr) after each step")
    schedule: Literal["cosine_7_16", "cosine_1_16", "cosine", "constant", "milestones"] = Field(
        "cosine_7_16", description="cos(7/16 pi t), cos(1/16 pi t), (1 + cos(pi t)) / 2, ...; t: share of the stage"
    )
    milestones: list[Milestone] = Field([], description="[share of the stage, factor] pairs: lr x factor from there on")
    warmup: float = Field(0.0, ge=0, lt=1, description="share of the stage in which lr rises linearly from 0")
    layer_decay: float = Field(1.0, gt=0, le=1, description="factor on lr of each group of layers below the head")

    @model_validator(mode="after")
    def _muon_has_momentum(self) -> OptimSettings:
        if self.name == "muon" and self.momentum == 0:
            raise ValueError("muon orthogonalizes its momentum, got momentum=0; use one above 0, or name=sgd")
        return self

    @model_validator(mode="after")
    def _milestones_fit(self) -> OptimSettings:
        if (self.schedule == "milestones") != bool(self.milestones):
            raise ValueError(f"schedule=milestones and milestones go together, got {self.schedule}, {self.milestones}")
        shares = [share for share, _ in self.milestones]
        if shares != sorted(shares) or not all(0 < share < 1 and factor > 0 for share, factor in self.milestones):
            raise ValueError(f"milestones must be ascending shares within 0..1, factors above 0, got {self.milestones}")
        return self


class EmaSettings(Section):
    decay: float = Field(0.999, ge=0, lt=1, description="0.99 for short runs")
    warmup: bool = Field(False, description="decay of update n since the start or a restart: min(1 - 1/n, decay)")
    buffers: Literal["copied", "averaged"] = Field("copied", description="BatchNorm statistics of the averaged network")


class CompileSettings(Section):
    use: Annotated[Literal["auto", "on", "off"], Word] = Field("auto", description="auto: where it pays")
    mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = Field(
        "default", description="torch.compile's; reduce-overhead records CUDA graphs"
    )
    graph: Annotated[Literal["auto", "step", "off"], Word] = Field(
        "auto", description="step: a whole step as one CUDA graph; auto: where there is a GPU"
    )

    @model_validator(mode="after")
    def _mode_has_effect(self) -> CompileSettings:
        if self.use == "off" and self.mode != "default":
            raise ValueError(f"mode={self.mode} has no effect with compile=off; leave one of them out")
        return self


class MethodSettings(BaseModel):
    """The method's name; every other key is an option of that method, checked against its constructor."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str = "semi"

    @property
    def options(self) -> dict[str, Any]:
        """All options of the method, resolved."""
        return dict(self.model_extra or {})


class Settings(Section):
    """Everything that decides what a run does. Defaults are the paper's recipe for CIFAR."""

    data: DataSettings = DataSettings()
    views: ViewsSettings = ViewsSettings()
    method: MethodSettings = MethodSettings()
    net: NetSettings = NetSettings()
    optim: OptimSettings = OptimSettings()
    ema: EmaSettings = EmaSettings()
    protocol: str = Field("", description="which published protocol is followed; its settings file says it")
    steps: int = Field(250_000, ge=1, description="optimizer steps of the run")
    batch: int = Field(64, ge=2, description="labeled images a step and process")
    mu: int = Field(1, ge=1, description="unlabeled images a step, as a multiple of batch")
    seed: int = Field(0, ge=0, lt=SEEDS)
    precision: Literal["auto", "bf16", "fp16", "fp32"] = Field("auto", description="auto: what the device is fast at")
    compile: CompileSettings = CompileSettings()
    threads: int | None = Field(None, ge=1, description="CPU threads of this process; none: its share of the cores")
    log_every: int = Field(50, ge=1, description="steps between two lines of the log")
    eval_every: int = Field(500, ge=1, description="steps between two evaluations")
    save_every: int = Field(5_000, ge=1, description="steps between two checkpoints")
    keep: int = Field(2, ge=1, description="newest checkpoints kept; the best one is kept besides")
    figure: Literal["last", "best", "mean20", "median20"] = Field(
        "mean20", description="accuracy reported: of the last, the best, or over the last 20 evaluations"
    )
    on_nonfinite: Literal["stop", "skip"] = Field("stop", description="at a loss or gradient that is not finite")
    resume: Literal["auto", "never"] = Field("auto", description="auto: go on from the run folder's newest checkpoint")
    start_from: FolderName | None = Field(None, description="folder of a finished run whose weights to start with")
    start_weights: Literal["averaged", "raw"] = Field("averaged", description="which of that run's weights")
    run_dir: FolderName | None = Field(None, description="none: runs/<data>-<method>-seed<seed>")
    report: Annotated[Literal["auto", "on", "off"], Word] = Field("auto", description="auto: from 100 steps on")
    wandb: Annotated[Literal["auto", "online", "offline", "off"], Word] = "auto"
    wandb_project: str = Field("semi-fast", min_length=1)
    quiet: Annotated[Literal["on", "off"], Word] = Field("off", description="on, or --quiet: print warnings alone")
    ceiling: Annotated[Literal["on", "off"], Word] = Field("on", description="measure the model-only rate at the start")

    @model_validator(mode="after")
    def _one_start(self) -> Settings:
        if self.start_from and self.net.weights:
            raise ValueError(f"start_from={self.start_from} and net.weights={self.net.weights} exclude each other")
        if self.net.freeze and not (self.start_from or self.net.weights):
            raise ValueError(
                f"net.freeze={self.net.freeze} keeps weights as they were loaded, and none are: set net.weights or "
                "start_from"
            )
        return self


class SettingsFile(NamedTuple):
    """A settings file read: what applies always, what with a method or network, and options by method."""

    settings: dict[str, Any]
    when: dict[str, dict[str, Any]]
    method_defaults: dict[str, dict[str, Any]]


def load_settings(argv: Sequence[str], processes: int = 1) -> Settings:
    """Settings from the command line: `[FILE ...] [key=value ...] [--quiet]`.

    Each FILE is a YAML file or the name of one in configs/. They are merged in order, later ones winning, then the
    overrides in order. Where none of them says on what to train (protocols do not), `digits_lt` comes first.

    Args:
        processes: of the run. The settings are the same whatever their number; a protocol's batch is that of all.

    Raises: UserError (one line) for a missing or broken file, an unknown key (the nearest is named), a wrong type or
        range, an unknown method, net or option.
    """
    words = ["quiet=on" if word == "--quiet" else word for word in argv]
    names = [word for word in words if "=" not in word]
    if all(Path(name).name.startswith(PROTOCOL) for name in names):
        names.insert(0, DEFAULT_CONFIG)
    files = [read_settings_file(name) for name in names]
    overrides = [parse_override(word) for word in words if "=" in word]
    if any("protocol" in override for override in overrides):
        raise UserError("protocol is said by the settings file that sets its values; name that file instead.")

    chosen = merge(*(file.settings for file in files), *overrides)
    method = str(chosen.get("method", {}).get("name", MethodSettings().name))
    net = str(chosen.get("net", {}).get("name", NetSettings().name))
    layers = [_layer(file, method, net) for file in files]
    known = check_options(method, {})
    defaults = [
        {key: value for key, value in file.method_defaults.get("*", {}).items() if key in known}
        | file.method_defaults.get(method, {})
        for file in files
    ]
    settings = resolve(merge({"method": merge(*defaults)}, *layers, *overrides))

    claims = [i for i, layer in enumerate(layers) if layer.get("protocol")]
    if not claims:
        return settings
    values = {key: value for key, value in layers[claims[-1]].items() if key in PROTOCOL_KEYS}
    named = {**flatten(values), **flatten({"method": defaults[claims[-1]]})}
    return settings.model_copy(update={"protocol": protocol_followed(settings, named, processes)})


def resolve(raw: dict[str, Any]) -> Settings:
    """Checked settings from nested plain values; method options are completed with their defaults."""
    raw = expand(raw)
    options = {"name": MethodSettings().name, **raw.get("method", {})}
    name = options.pop("name")
    raw["method"] = {"name": name, **check_options(name, options)}
    try:
        settings = Settings.model_validate(raw)
    except ValidationError as error:
        raise _as_user_error(error) from None
    settings.views.policies()  # complains about what no single key shows
    return settings


def protocol_followed(settings: Settings, said: dict[str, Any], processes: int) -> str:
    """The protocol's name, with the settings behind it that are not as the protocol has them.

    Args:
        settings: resolved, with the protocol's name as its file gives it.
        said: what the file sets, flattened.
        processes: each of which reads `batch` labeled images a step.
    """
    values = {**flatten(settings.model_dump()), "batch": settings.batch * processes}
    name, before = _parts_of(settings.protocol)
    published = CONFIGS / f"{PROTOCOL}{name.removeprefix('P-').lower()}.yaml"
    if published.is_file():  # the file may be a run's config.yaml, whose batch is that of one of its processes
        layer = _layer(read_settings_file(str(published)), settings.method.name, settings.net.name)
        said = {**said, "batch": layer["batch"]}
    changed = {key for key, value in said.items() if values[key] != value} | before
    if settings.figure == "last":
        changed.discard("eval_every")  # which evaluations come before the last changes nothing
    return _protocol(name, changed)


def _layer(file: SettingsFile, method: str, net: str) -> dict[str, Any]:
    """What a settings file says where a method and a network are chosen."""
    return merge(file.settings, *(file.when.get(condition, {}) for condition in (f"method={method}", f"net={net}")))


def with_change(protocol: str, key: str) -> str:
    """The name of a protocol with one more setting that is not as the protocol has it."""
    name, before = _parts_of(protocol)
    return _protocol(name, before | {key})


def _protocol(name: str, changed: set[str]) -> str:
    return f"{name} (changed: {', '.join(sorted(changed))})" if changed else name


def _parts_of(protocol: str) -> tuple[str, set[str]]:
    """What `_protocol` put together: the name, and the settings that are not as the protocol has them."""
    name, _, changed = protocol.removesuffix(")").partition(" (changed: ")
    return name, {*filter(None, changed.split(", "))}


def read_settings_file(name: str) -> SettingsFile:
    """The settings file of that path or, without a suffix, of that name in configs/; short forms expanded.

    Raises: UserError for a file that is missing or broken, and for a wrong name or option in its tables.
    """
    is_path = Path(name).suffix in (".yaml", ".yml") or len(Path(name).parts) > 1
    path = Path(name) if is_path else CONFIGS / f"{name}.yaml"
    if not path.is_file():
        known = sorted(file.stem for file in CONFIGS.glob("*.yaml"))
        if is_path:
            raise UserError(f"No settings file at {path}. Settings that exist: {', '.join(known)}.")
        raise unknown("settings file", name, known)
    raw = read_yaml(path)
    when, defaults = raw.pop("when", None) or {}, raw.pop("method_defaults", None) or {}
    if not _is_table(defaults):
        raise UserError(f"method_defaults reads {{method: {{option: value}}}}, got {defaults!r}.")
    for method, options in defaults.items():
        if method != "*":
            check_options(method, options)
    if not _is_table(when):
        raise UserError(f"when reads {{method=NAME or net=NAME: {{setting: value}}}}, got {when!r}.")
    for condition in when:
        kind, _, value = condition.partition("=")
        if kind == "method":
            method_class(value)
        elif kind != "net" or not value:
            raise UserError(f"A condition of `when` reads method=NAME or net=NAME, got '{condition}'.")
    return SettingsFile(expand(raw), {key: expand(value) for key, value in when.items()}, defaults)


def read_yaml(path: Path) -> dict[str, Any]:
    """The values of a YAML file of `key: value` lines. Raises: UserError for any other content; OSError."""
    content = io.BytesIO(path.read_bytes())
    try:
        raw = _plain(OmegaConf.load(content))
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:  # OSError: a number, say
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path} must hold `key: value` lines.")
    return raw


def read_run_config(folder: Path) -> dict[str, Any]:
    """The settings of a run as its config.yaml holds them: plain values, unchecked.

    Raises: UserError when the folder holds no run, or its config.yaml cannot be read.
    """
    path = folder / "config.yaml"
    try:
        return read_yaml(path)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder} is no run's folder (config.yaml is missing). Name a folder of runs/.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None


def parse_override(text: str) -> dict[str, Any]:
    """`optim.lr=0.1` -> {"optim": {"lr": 0.1}}. The value is read as YAML."""
    key, _, value = text.partition("=")
    if not all(key.split(".")):
        raise UserError(f"An override reads key=value (optim.lr=0.1), got '{text}'.")
    try:
        return expand(_plain(OmegaConf.from_dotlist([text])))
    except (YAMLError, OmegaConfBaseException):
        raise UserError(f"The value of {key} is not valid YAML: '{value}'. Quote it.") from None


def merge(*layers: dict[str, Any]) -> dict[str, Any]:
    """Nested values merged into new ones; later layers win, and a list replaces a list."""
    merged: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            below = merged.get(key)
            merged[key] = merge(below if isinstance(below, dict) else {}, value) if isinstance(value, dict) else value
    return merged


def expand(raw: dict[str, Any]) -> dict[str, Any]:
    """Write short forms out: `method: semi` -> `method: {name: semi}`, and a policy's name as that policy's values.

    A data folder given without its `build` voids the one of a layer below, which makes another folder.
    """
    raw = {
        key: {SHORT_FORMS[key]: value} if key in SHORT_FORMS and not isinstance(value, dict) else value
        for key, value in raw.items()
    }
    if "path" in raw.get("data", {}):
        raw["data"] = {"build": None, **raw["data"]}
    return {**raw, "views": complete_views(raw["views"])} if "views" in raw else raw


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"optim": {"lr": 0.1}} -> {"optim.lr": 0.1}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _is_table(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(row, dict) for row in value.values())


def _plain(config: Any) -> Any:
    """The containers of OmegaConf as Python's, with whole numbers as integers: 1e5 counts steps."""
    if OmegaConf.is_config(config):
        config = OmegaConf.to_container(config)
    if isinstance(config, dict):
        return {str(key): _plain(value) for key, value in config.items()}
    if isinstance(config, list):
        return [_plain(value) for value in config]
    return int(config) if isinstance(config, float) and config.is_integer() else config


def _as_user_error(error: ValidationError) -> UserError:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return unknown("config key", key, flatten(Settings().model_dump()))
    if first["type"] == "value_error":  # a rule over several keys, which names what it got
        return UserError(f"{key}: {first['ctx']['error']}." if key else f"{first['ctx']['error']}.")
    rule = first["msg"][0].lower() + first["msg"][1:]
    return UserError(f"{key}: {rule}, got {first['input']!r}.")
