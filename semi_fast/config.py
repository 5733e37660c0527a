"""Settings of a run: a YAML file of `configs/`, then `key=value` overrides, checked before anything else happens."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from data_prep.errors import UserError, unknown
from semi_fast.methods import check_options
from semi_fast.policies import ViewsSettings, complete_views, write_out

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
DEFAULT_CONFIG = "digits_lt"
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


class Section(BaseModel):
    """A group of settings: unknown keys are errors, values are not changed after the check."""

    # Strict: a word is no number and a truth value no count; an int still passes as a float.
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)


class DataSettings(Section):
    path: FolderName = Field("data/digits-lt", description="data folder, as data_prep/build.py writes it")
    backend: Literal["auto", "resident", "ffcv", "dali"] = Field(
        "auto", description="resident and ffcv give the same bits; dali augments by its own operators"
    )


class NetSettings(Section):
    name: str = Field("wrn28_2", description="wrn28_2, resnet50, or wrn<depth>_<width>")
    bn_momentum: float = Field(0.001, gt=0, le=1, description="in PyTorch's sense; 0.1 for short runs")


class OptimSettings(Section):
    lr: float = Field(0.03, gt=0, description="base learning rate of SGD")
    momentum: float = Field(0.9, ge=0, lt=1)
    nesterov: bool = True
    weight_decay: float = Field(5e-4, ge=0, description="not on biases and BatchNorm")


class CompileSettings(Section):
    use: Annotated[Literal["auto", "on", "off"], Word] = Field("auto", description="auto: where it pays")
    mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = Field(
        "default", description="torch.compile's; reduce-overhead records CUDA graphs"
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
    steps: int = Field(250_000, ge=1, description="optimizer steps of the run")
    batch: int = Field(64, ge=2, description="labeled images a step and process")
    mu: int = Field(1, ge=1, description="unlabeled images a step, as a multiple of batch")
    seed: int = Field(0, ge=0, lt=2**31)
    ema_decay: float = Field(0.999, ge=0, lt=1, description="0.99 for short runs")
    precision: Literal["auto", "bf16", "fp16", "fp32"] = Field("auto", description="auto: what the device is fast at")
    compile: CompileSettings = CompileSettings()
    threads: int | None = Field(None, ge=1, description="CPU threads of this process; none: its share of the cores")
    log_every: int = Field(50, ge=1, description="steps between two lines of the log")
    eval_every: int = Field(500, ge=1, description="steps between two evaluations")
    save_every: int = Field(500, ge=1, description="steps between two checkpoints")
    keep: int = Field(2, ge=1, description="newest checkpoints kept; the best one is kept besides")
    on_nonfinite: Literal["stop", "skip"] = Field("stop", description="at a loss or gradient that is not finite")
    protocol: str = Field("", description="name of the protocol the results stand under")
    figure: Literal["last", "best", "mean20", "median20"] = Field(
        "last", description="the reported one: of the last evaluation, the best, or of the last 20"
    )
    resume: Literal["auto", "never"] = Field("auto", description="auto: go on from the run folder's newest checkpoint")
    run_dir: FolderName | None = Field(None, description="none: runs/<data>-<method>-seed<seed>")
    report: Annotated[Literal["auto", "on", "off"], Word] = Field("auto", description="auto: from 100 steps on")
    wandb: Annotated[Literal["auto", "online", "offline", "off"], Word] = "auto"
    wandb_project: str = Field("semi-fast", min_length=1)
    quiet: Annotated[Literal["on", "off"], Word] = Field("off", description="on, or --quiet: print warnings alone")
    ceiling: Annotated[Literal["on", "off"], Word] = Field("on", description="measure the model-only rate at the start")


def load_settings(argv: Sequence[str]) -> Settings:
    """Settings from the command line: `[CONFIG] [key=value ...] [--quiet]`.

    CONFIG is a YAML file or the name of one in configs/; without it, `digits_lt`. A file may hold
    `method_defaults: {semi: {...}}`: options that apply when that method is chosen. Later overrides win.

    Raises: UserError (one line) for a missing or broken file, an unknown key (the nearest is named), a wrong type or
        range, an unknown method, net or option.
    """
    if "--quiet" in argv:
        argv = [*(text for text in argv if text != "--quiet"), "quiet=on"]
    name, overrides = (argv[0], argv[1:]) if argv and "=" not in argv[0] else (DEFAULT_CONFIG, argv)
    raw = read_config(name)
    defaults = checked_defaults(raw.pop("method_defaults", None) or {})
    for override in overrides:
        merge(raw, parse_override(override))
    return resolve(raw, defaults)


def resolve(raw: dict[str, Any], method_defaults: dict[str, Any] | None = None) -> Settings:
    """Checked settings from nested plain values; method options are completed with their defaults."""
    raw = expand(raw)
    method = raw.setdefault("method", {})
    name = method.setdefault("name", MethodSettings().name)
    options = {**(method_defaults or {}).get(name, {}), **{k: v for k, v in method.items() if k != "name"}}
    raw["method"] = {"name": name, **check_options(name, options)}
    raw["views"] = complete_views(raw.get("views", {}))
    try:
        settings = Settings.model_validate(raw)
    except ValidationError as error:
        raise _as_user_error(error) from None
    settings.views.policies()  # complains about what no single key shows
    return settings


def checked_defaults(defaults: Any) -> dict[str, dict[str, Any]]:
    """`method_defaults` of a settings file: options by method. Raises: UserError for a name or value that is wrong."""
    if not isinstance(defaults, dict) or not all(isinstance(options, dict) for options in defaults.values()):
        raise UserError(f"method_defaults reads {{method: {{option: value}}}}, got {defaults!r}.")
    for name, options in defaults.items():
        check_options(name, options)
    return defaults


def read_config(name: str) -> dict[str, Any]:
    """The settings file of that path or, without a suffix, of that name in configs/; short forms expanded."""
    path = Path(name) if Path(name).suffix else CONFIGS / f"{name}.yaml"
    if not path.is_file():
        known = sorted(file.stem for file in CONFIGS.glob("*.yaml"))
        if Path(name).suffix:
            raise UserError(f"No settings file at {path}. Settings that exist: {', '.join(known)}.")
        raise unknown("settings file", name, known)
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if raw is None:
        raw = {}
    if not isinstance(raw, dict):
        raise UserError(f"{path} must hold `key: value` lines, got a {type(raw).__name__}.")
    return expand(_numbers(raw))


def read_run_config(folder: Path) -> dict[str, Any]:
    """The settings of the run in a folder, as plain values, unchecked.

    Raises: UserError when the folder holds no run, or its config.yaml cannot be read.
    """
    path = folder / "config.yaml"
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        near = sorted(str(other.parent) for other in [*folder.glob("*/config.yaml"), *folder.glob("../*/config.yaml")])
        known = f" Runs there: {', '.join(near[:8])}." if near else ""
        problem = f"{folder} is no run's folder (config.yaml is missing)"
        raise UserError(f"{problem}. Name a folder of runs/.{known}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read ({' '.join(str(error).split())}).") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path} must hold `key: value` lines, got a {type(raw).__name__}.")
    return raw


def parse_override(text: str) -> dict[str, Any]:
    """`optim.lr=0.1` -> {"optim": {"lr": 0.1}}. The value is read as YAML."""
    key, equals, value = text.partition("=")
    if not equals or not key or any(not part for part in key.split(".")):
        raise UserError(f"An override reads key=value (optim.lr=0.1), got '{text}'.")
    try:
        parsed = _numbers(yaml.safe_load(value)) if value else None
    except yaml.YAMLError:
        raise UserError(f"The value of {key} is not valid YAML: '{value}'. Quote it.") from None
    first, *inner = key.split(".")
    for part in reversed(inner):
        parsed = {part: parsed}
    return expand({first: parsed})


def merge(into: dict[str, Any], new: dict[str, Any]) -> None:
    """Merge nested values in place; new ones win."""
    for key, value in new.items():
        names_policy = isinstance(value, dict) and "policy" in value  # of a view: what was said before is void
        if isinstance(value, dict) and isinstance(into.get(key), dict) and not names_policy:
            merge(into[key], value)
        else:
            into[key] = value


def expand(raw: dict[str, Any]) -> dict[str, Any]:
    """Write short forms out: `method: semi` -> `method: {name: semi}`, `views: {strong: NAME}` likewise."""
    expanded = {
        key: {SHORT_FORMS[key]: value} if key in SHORT_FORMS and not isinstance(value, dict) else value
        for key, value in raw.items()
    }
    return {**expanded, "views": write_out(raw["views"])} if "views" in raw else expanded


def known_keys() -> list[str]:
    """Every key a user may write, in dotted form."""
    return list(_keys(Settings))


def _keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from _keys(inner, f"{prefix}{name}.")
        else:
            yield prefix + name


def _numbers(value: Any) -> Any:
    # YAML 1.1 takes 5e-4 for text because it lacks a dot.
    if isinstance(value, dict):
        return {str(key): _numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value):
        number = float(value)
        return int(number) if number.is_integer() else number
    return value


def _as_user_error(error: ValidationError) -> UserError:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return unknown("config key", key, known_keys())
    if first["type"] == "value_error":  # a rule over several keys, which names what it got
        return UserError(f"{key}: {first['ctx']['error']}.")
    rule = first["msg"][0].lower() + first["msg"][1:]
    return UserError(f"{key}: {rule}, got {first['input']!r}.")
