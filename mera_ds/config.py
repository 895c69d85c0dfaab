"""Configuration: frozen dataclasses, strict loading, dotted overrides. Imports no torch.

A run's settings are read from `<run>/config.yaml` alone. `ExecutionConfig` holds what may differ
between two executions of a run (processes, ZeRO stage, …); all else is fixed when it is made.
"""

import dataclasses
import difflib
import os
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from mera_ds.errors import InputError
from mera_ds.files import write_bytes
from mera_ds.mergeconfig import MergeConfig

T = TypeVar("T")
Dtype = Literal["fp32", "fp16", "bf16"]
Options = Mapping[str, Any]

PROFILES = Path(__file__).parent / "profiles"
REPOSITORY = Path(__file__).parents[1]


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """The shared language model."""

    path: str
    """Folder of an HF checkpoint (config, tokenizer, safetensors)."""
    dtype: Dtype = "fp32"
    """Compute dtype of the frozen weights; trainable ones have fp32 masters."""
    attention: Literal["auto", "flash_attention_2", "sdpa", "eager"] = "auto"
    """`auto`: flash-attn 2 where it is installed and the dtype allows it, SDPA otherwise."""
    gradient_checkpointing: bool = False


@dataclass(frozen=True, kw_only=True)
class PromptConfig:
    """How a medium, a question and an answer become one token sequence."""

    style: Literal["plain", "chat"] = "chat"
    """`chat`: the tokenizer's chat template; `plain`: media, question, newline, answer."""
    max_length: int = 2048
    """Longest row in tokens, media included; a longer sample is an error."""


@dataclass(frozen=True, kw_only=True)
class ComponentConfig:
    """An encoder or a connector: which kind, its weights and its own options."""

    kind: str
    weights: str | None = None
    options: Options = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ModalityConfig:
    """One modality: its shard sets, its frozen encoder and its connector."""

    data: tuple[str, ...]
    """Shard folders; each holds `train/` and `test/`."""
    encoder: ComponentConfig
    connector: ComponentConfig
    caption_prompt: str
    """Instruction of the caption task."""
    lr_scale: float = 1.0
    """Factor on this connector's learning rate: a transformer stands less than an MLP."""


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters on every linear layer of the backbone (paper: rank = alpha = 128)."""

    rank: int = 128
    alpha: float = 128.0
    dropout: float = 0.0


@dataclass(frozen=True, kw_only=True)
class PhaseConfig:
    """Hyperparameters of one training phase (paper, Table 7)."""

    tasks: tuple[Literal["caption", "qa"], ...]
    batch_size: int
    """Global batch in samples, whatever the number of processes."""
    lr_connector: float
    lr_backbone: float | None = None
    """Learning rate of LoRA; only for the phase that trains the backbone."""
    epochs: int = 1
    max_steps: int | None = None
    """Stop after so many optimizer steps (the epochs bound it as well)."""
    warmup_ratio: float = 0.03
    schedule: Literal["cosine", "constant"] = "cosine"
    weight_decay: float = 0.0
    max_grad_norm: float = 0.0
    """Gradient clipping by global norm; 0 switches it off."""


@dataclass(frozen=True, kw_only=True)
class ReplayConfig:
    """The replay set R_i: r % of D_1 … D_i (paper, section 4.2)."""

    percent: float = 10.0

    def __post_init__(self) -> None:
        """Check the range."""
        if not 0 < self.percent <= 100:
            raise InputError(f"replay.percent is {self.percent}; it must be in (0, 100]")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Generation and scoring."""

    batch_size: int = 16
    max_new_tokens: int = 64
    limit: int | None = None
    """Evaluate only the first so many items of each task."""
    judge: Literal["offline-exact", "offline-containment", "openai"] = "offline-exact"
    judge_model: str = "gpt-4o-mini-2024-07-18"
    judge_base_url: str | None = None
    judge_max_dollars: float = 5.0
    """Stop asking the judge when this much was spent in one task."""
    judge_prices: tuple[float, ...] = ()
    """US dollars per million input and output tokens, for a model whose prices aren't known."""
    tokenizer: Literal["auto", "ptb-java", "ptb-python", "raw"] = "auto"


@dataclass(frozen=True, kw_only=True)
class ExecutionConfig:
    """What may differ between two executions of one run without changing what it computes."""

    zero: Literal[0, 1, 2, 3] = 1
    ds_config: str | None = None
    """DeepSpeed JSON with engine settings (offload, buckets); default `ds_configs/zero<n>.json`."""
    launcher: Literal["inline", "torchrun", "deepspeed"] = "inline"
    """How `mera-ds run` starts a training step; `inline`: in its own process."""
    processes: int = 1
    micro_batch_size: int = 16
    """Largest number of samples a process takes through the model at once."""
    workers: int = 0
    """Loader processes per rank; 0 decodes in the training process."""
    features: Literal["online", "cached"] = "cached"
    """`cached`: the encoders run once per medium and their features are kept on disk."""
    save_every: int = 50
    """Optimizer steps between two checkpoints."""
    keep_checkpoints: int = 2
    max_nonfinite_steps: int = 8
    """Stop when more steps than this had a non-finite loss or gradient."""
    timeout_seconds: int = 1800
    """How long a collective operation waits for a missing rank."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything a run needs."""

    profile: str
    description: str = ""
    limits: str = ""
    """One sentence on what the results can't tell; printed with them."""
    method: str = "mera"
    order: tuple[str, ...]
    seed: int = 0
    build: str | None = None
    """A recipe whose shards (and weights) `mera-ds init` makes inside the run folder."""
    backbone: BackboneConfig
    prompt: PromptConfig
    modalities: Mapping[str, ModalityConfig]
    lora: LoraConfig
    align: PhaseConfig
    tune: PhaseConfig
    realign: PhaseConfig
    replay: ReplayConfig = ReplayConfig()
    merge: MergeConfig = field(default_factory=MergeConfig)
    evaluate: EvaluateConfig = EvaluateConfig()
    execution: ExecutionConfig = ExecutionConfig()

    def __post_init__(self) -> None:
        """Check ranges, and that the order names each configured modality at most once."""
        for section in ("prompt", "lora", "align", "tune", "realign", "evaluate", "execution"):
            _require_counts(getattr(self, section), section)
        for name in self.order:
            require_known(name, self.modalities, "order: modality")
        if len(set(self.order)) != len(self.order):
            raise InputError(f"order names a modality twice: {', '.join(self.order)}")
        if self.tune.lr_backbone is None:
            raise InputError("tune.lr_backbone is missing; tune trains connector and backbone")

    def phase(self, name: str) -> PhaseConfig:
        """Return the hyperparameters of `align`, `tune` or `realign`."""
        return {"align": self.align, "tune": self.tune, "realign": self.realign}[name]


def _require_counts(section: Any, where: str) -> None:
    """Raise `InputError` naming a whole number that is negative, or 0 where that means nothing."""
    for name, value in vars(section).items():
        least = 0 if name in ("workers", "zero", "max_nonfinite_steps") else 1
        if type(value) is int and value < least:
            raise InputError(f"{where}.{name} is {value}; it must be at least {least}")


def require_known(name: str, known: typing.Iterable[str], what: str) -> None:
    """Raise `InputError` with the nearest valid name unless `name` is one of `known`."""
    names = list(known)
    if name in names:
        return
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'?" if near else f"valid: {', '.join(sorted(names))}"
    raise InputError(f"{what} '{name}' is unknown; {hint}")


def parse(cls: type[T], value: Mapping[str, Any], where: str) -> T:
    """Build a frozen dataclass from a mapping, strictly.

    Args:
        cls: the dataclass.
        value: names and values, as YAML gives them.
        where: what to call the mapping in messages, e.g. the file or the dotted key.

    Raises:
        InputError: on an unknown name (with the nearest valid one), a missing one, or a value of
            the wrong type.
    """
    if not isinstance(value, Mapping):
        raise InputError(f"{where}: expected a mapping, got {value!r}")
    fields = {entry.name: entry for entry in dataclasses.fields(typing.cast(Any, cls))}
    for name in value:
        require_known(str(name), fields, f"{where}: key")
    types_of = typing.get_type_hints(cls)
    missing = [
        name
        for name, entry in fields.items()
        if name not in value and entry.default is entry.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise InputError(f"{where}: missing key '{missing[0]}'; add it")
    arguments = {
        name: _convert(item, types_of[name], f"{where}.{name}") for name, item in value.items()
    }
    try:
        return cls(**arguments)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def _convert(value: Any, kind: Any, where: str) -> Any:
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        (kind,) = (entry for entry in typing.get_args(kind) if entry is not type(None))
        return None if value is None else _convert(value, kind, where)
    if origin is Literal:
        choices = typing.get_args(kind)
        if value in choices and type(value) in {type(choice) for choice in choices}:
            return value
        raise InputError(f"{where} is {value!r}; valid: {', '.join(map(str, choices))}")
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise InputError(f"{where} is {value!r}; expected a list")
        item = typing.get_args(kind)[0]
        return tuple(_convert(entry, item, f"{where}[{i}]") for i, entry in enumerate(value))
    if dataclasses.is_dataclass(kind):
        return parse(typing.cast(type, kind), value, where)
    if origin is not None and issubclass(origin, Mapping):
        return _convert_mapping(value, typing.get_args(kind)[1], where)
    return _convert_scalar(value, kind, where)


def _convert_mapping(value: Any, item: Any, where: str) -> Any:
    if not isinstance(value, Mapping):
        raise InputError(f"{where} is {value!r}; expected a mapping")
    return {str(key): _convert(entry, item, f"{where}.{key}") for key, entry in value.items()}


def _convert_scalar(value: Any, kind: Any, where: str) -> Any:
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if kind is Any or type(value) is kind:
        return value
    raise InputError(f"{where} is {value!r}; expected {kind.__name__}")


def dump(config: Any) -> dict[str, Any]:
    """Return a dataclass as plain data: the inverse of `parse`."""
    return typing.cast(dict[str, Any], _plain(dataclasses.asdict(config)))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping with the safe loader; a broken file is an `InputError`."""
    try:
        value = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} must hold a mapping of settings")
    return value


class _Loader(yaml.SafeLoader):
    """The safe loader, reading `2e-5` as a number as every YAML 1.2 reader does."""


_FLOAT = re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def profile_names() -> list[str]:
    """Return the names of the profiles that come with the package."""
    return sorted(path.stem for path in PROFILES.glob("*.yaml"))


def load_profile(name: str, overrides: typing.Sequence[str] = ()) -> RunConfig:
    """Load a shipped profile by name, or a profile file by path, with `key=value` overrides."""
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        require_known(name, profile_names(), "profile")
        path = PROFILES / f"{name}.yaml"
    values = read_yaml(path)
    values.setdefault("profile", path.stem)
    return parse(RunConfig, apply_overrides(values, overrides), path.name)


def apply_overrides(values: Mapping[str, Any], overrides: typing.Sequence[str]) -> dict[str, Any]:
    """Return `values` with dotted `section.key=value` overrides; values are read as YAML."""
    result: dict[str, Any] = _plain(values)
    for text in overrides:
        key, equals, raw = text.partition("=")
        if not equals:
            raise InputError(f"override '{text}' must look like section.key=value")
        *sections, last = key.split(".")
        target = result
        for section in sections:
            target = target.setdefault(section, {})
            if not isinstance(target, dict):
                raise InputError(f"override '{text}': {section} is not a section")
        try:
            target[last] = yaml.load(raw, Loader=_Loader)
        except yaml.YAMLError:  # a text, such as `{run}/weights`; its type is checked later
            target[last] = raw
    return result


def save_config(config: RunConfig, path: Path) -> None:
    """Write the resolved configuration as YAML."""
    text = yaml.safe_dump(dump(config), sort_keys=False, allow_unicode=True, width=100)
    write_bytes(path, text.encode())


def load_config(run: Path, execution: typing.Sequence[str] = ()) -> RunConfig:
    """Load a run's configuration, with overrides of its `execution` section only.

    Raises:
        InputError: if the run does not exist, or an override would change what it computes.
    """
    path = run / "config.yaml"
    if not path.exists():
        raise InputError(
            f"there is no run at {run}; make one with 'mera-ds init {run} --profile pocket'"
        )
    for text in execution:
        if not text.startswith("execution."):
            raise InputError(
                f"'{text}' can't change in an existing run (only execution.* can); "
                "make a new run with 'mera-ds init'"
            )
    return parse(RunConfig, apply_overrides(read_yaml(path), execution), str(path))


def cache_folder() -> Path:
    """Return where converted weights and features are kept: $MERA_CACHE or ~/.cache/mera-ds."""
    return Path(os.environ.get("MERA_CACHE") or Path.home() / ".cache" / "mera-ds")


def resolve_path(text: str, run: Path) -> Path:
    """Return a configured path with `{run}`, `{cache}` and `{repository}` filled in."""
    places = {"run": run, "cache": cache_folder(), "repository": REPOSITORY}
    try:
        return Path(text.format(**places)).expanduser()
    except (KeyError, IndexError, ValueError, AttributeError):
        raise InputError(
            f"path '{text}' holds an unknown place; valid: {{run}}, {{cache}}, {{repository}}"
        ) from None
