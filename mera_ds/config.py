"""Configuration: frozen dataclasses, strict loading, dotted overrides. Imports no torch.

A run's settings are read from `<run>/config.yaml` alone. `ExecutionConfig` holds what may differ
between two executions of a run (processes, ZeRO stage, …); all else is fixed when it is made.
"""

import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from mera_ds.errors import InputError
from mera_ds.files import write_bytes
from mera_ds.mergeconfig import CMA, MergeConfig
from mera_ds.places import REPOSITORY as REPOSITORY
from mera_ds.places import cache_folder as cache_folder
from mera_ds.places import resolve_path as resolve_path
from mera_ds.places import shards_folder as shards_folder
from mera_ds.places import weights_folder as weights_folder
from mera_ds.settings import (
    apply_overrides,
    dump,
    merge_settings,
    parse,
    read_yaml,
    require_known,
    require_ranges,
)

Dtype = Literal["fp32", "fp16", "bf16"]
Recomputation = bool | int | Literal["none", "all", "selective"]
Decode = Literal["eager", "static", "compiled"]
Options = Mapping[str, Any]

PROFILES = Path(__file__).parent / "profiles"


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """The shared language model."""

    path: str
    """Folder of an HF checkpoint (config, tokenizer, safetensors)."""
    dtype: Dtype = "fp32"
    """Compute dtype of the frozen weights; trainable ones have fp32 masters."""
    attention: Literal["auto", "flash_attention_2", "sdpa", "eager"] = "auto"
    """`auto`: flash-attn 2 where it is installed and the dtype allows it, SDPA otherwise."""
    gradient_checkpointing: Recomputation = False
    """What the backward pass computes again instead of keeping it: `none` (false), `all` (true),
    that many of the lowest layers, or `selective`: all but matrix products and attention."""
    embedding_device: Literal["same", "cpu"] = "same"
    """`cpu`: the input embedding stays in host memory; only the rows of a batch go to the GPU."""

    def __post_init__(self) -> None:
        """Check the range."""
        if not isinstance(self.gradient_checkpointing, str) and self.gradient_checkpointing < 0:
            raise InputError(
                f"backbone.gradient_checkpointing is {self.gradient_checkpointing}; as a number of "
                "layers it must be at least 0"
            )


@dataclass(frozen=True, kw_only=True)
class PromptConfig:
    """How a medium, a question and an answer become one token sequence."""

    style: Literal["plain", "chat"] = "chat"
    """`chat`: the tokenizer's chat template; `plain`: medium, question, answer."""
    system: str | None = None
    """What the system says in style `chat`; None: what the template writes by itself."""
    qa_suffix: str | None = None
    """A line below every question, e.g. LLaVA's request for a single word or phrase."""
    align_style: Literal["same", "bare"] = "same"
    """Rows of align; `bare`: medium and caption alone, no instruction (LLaVA's stage 1)."""
    align_end: Literal["end", "newline"] = "end"
    """What a `bare` caption ends with: the end token, as everywhere, or LLaVA's newline."""
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
    """Shard folders or URLs of them; each holds `train/` and `test/`."""
    encoder: ComponentConfig
    connector: ComponentConfig
    caption_prompt: str
    """Instruction of the caption task."""
    lr_scale: float = 1.0
    """Factor on this connector's learning rate: a transformer stands less than an MLP."""
    feature_dtype: Literal["fp32", "fp16"] = "fp32"
    """fp16 halves cached features, rounding each value to 11 bits (by 1/2048 of it at most)."""


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
    """Learning rate of LoRA or the whole backbone; only for the phase that trains it."""
    epochs: int = 1
    max_steps: int | None = None
    """Stop after so many optimizer steps (the epochs bound it as well)."""
    warmup_ratio: float = 0.03
    schedule: Literal["cosine", "constant"] = "cosine"
    weight_decay: float = 0.0
    max_grad_norm: float = 0.0
    """Gradient clipping by global norm; 0 switches it off."""
    texts_together: int = 1
    """How many texts of a medium stand together in the order of samples, which then are not drawn
    independently; for `execution.shared_prefix`."""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """`adamw8bit`: moments of 8 bit (bitsandbytes), 2 instead of 8 bytes per trained number."""


@dataclass(frozen=True, kw_only=True)
class ReplayConfig:
    """The replay set R_i: r % of D_1 … D_i, or of D_1 … D_{i−1} for Replay (paper, section 4)."""

    percent: float = 10.0
    realign_percent: float | None = None
    """r of realigning, where it differs: in Table 5, Replay (1%) is realigned with 10 %."""

    @property
    def realigning(self) -> float:
        """r of realigning."""
        return self.percent if self.realign_percent is None else self.realign_percent

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name, value in (("percent", self.percent), ("realign_percent", self.realigning)):
            if not 0 < value <= 100:
                raise InputError(f"replay.{name} is {value}; it must be in (0, 100]")


@dataclass(frozen=True, kw_only=True)
class EwcConfig:
    """Online EWC (paper, appendix D)."""

    strength: float = 1.0
    """λ, the weight of the penalty."""
    percent: float = 1.0
    """Share of a stage's data on which the Fisher information is measured after it."""
    decay: float = 1.0
    """Factor of the sum of the stages before when a stage is added; 1: the paper's plain sum."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not (self.strength >= 0 and 0 < self.percent <= 100 and 0 <= self.decay <= 1):
            raise InputError(
                f"ewc.strength={self.strength}, ewc.percent={self.percent}, ewc.decay={self.decay} "
                "must be at least 0, in (0, 100], and in [0, 1]"
            )


@dataclass(frozen=True, kw_only=True)
class PathWeaveConfig:
    """PathWeave's adapter-in-adapter; its rank and scale are those of `lora`."""

    inner: Literal["random", "identity"] = "random"
    """First values of an in-adapter: those of a fresh linear layer (PathWeave's code), or 1."""


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
    judge_concurrency: int = 8
    judge_requests_per_minute: int | None = None
    judge_tokens_per_minute: int | None = None
    """None: as fast as the server answers."""
    judge_prices: tuple[float, ...] = ()
    """US dollars per million input and output tokens, for a model whose prices aren't known."""
    tokenizer: Literal["auto", "ptb-java", "ptb-python", "raw"] = "auto"

    def __post_init__(self) -> None:
        """Check the prices, which a run would miss only when it has trained."""
        if len(self.judge_prices) not in (0, 2) or any(price < 0 for price in self.judge_prices):
            raise InputError(
                "evaluate.judge_prices must be [input, output], in dollars per million tokens"
            )


@dataclass(frozen=True, kw_only=True)
class ExecutionConfig:
    """What may differ between two executions of one run without changing what it computes."""

    zero: Literal[0, 1, 2, 3] = 1
    ds_config: str | None = None
    """DeepSpeed JSON with engine settings (offload, buckets); default `ds_configs/zero<n>.json`."""
    nvme_folder: str | None = None
    """Where a `ds_config` that offloads to NVMe writes: a folder on each node's own disk."""
    launcher: Literal["inline", "torchrun", "deepspeed"] = "inline"
    """How `mera-ds run` starts a training step; `inline`: in its own process."""
    processes: int = 1
    compile: bool = False
    """Train with the backbone's layers compiled (torch.compile); needs a C++ compiler or Triton."""
    micro_batch_size: int = 16
    """Largest number of samples a process takes through the model at once."""
    packing: bool = False
    """Put the samples of a micro-batch into one row without padding, attention kept apart."""
    shared_prefix: bool = False
    """Take a medium through the backbone once for all its texts in a micro-batch; packs as well."""
    workers: int = 0
    """Loader processes per rank; 0 decodes in the training process."""
    features: Literal["online", "cached"] = "cached"
    """`cached`: the encoders run once per medium and their features are kept on disk."""
    verify_shards: bool = True
    """Compare each tar's hash with its index when it is first opened."""
    shard_cache_gb: int = 50
    """Largest size of all tars that were fetched from URLs."""
    media_cache_mb: int = 512
    """Decoded media that a loader process keeps for their other texts."""
    decode: Decode = "eager"
    """How evaluation generates. `eager`: transformers' loop; `static`: a key-value cache of fixed
    size; `compiled`: that in one CUDA graph per token (the first batch takes minutes)."""
    save_every: int = 50
    """Optimizer steps between two checkpoints."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints are kept."""
    keep_every: int = 0
    """Checkpoints whose step is a multiple of this are kept, too, until the phase ends; 0: none."""
    saving: Literal["background", "blocking"] = "background"
    """`background`: a thread writes a checkpoint while the training goes on."""
    max_nonfinite_steps: int = 8
    """Stop when more steps than this had a non-finite loss or gradient."""
    timeout_seconds: int = 1800
    """How long ranks wait for one that shows no sign of life or doesn't get on, before all end."""


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
    plugins: tuple[str, ...] = ()  # files with kinds of one's own, see `mera_ds.registry`
    tuning: Literal["lora", "full"] = "lora"
    """What tune trains of the backbone: LoRA factors on it, or all of its weights."""
    lora: LoraConfig
    align: PhaseConfig
    tune: PhaseConfig
    realign: PhaseConfig
    replay: ReplayConfig = ReplayConfig()
    ewc: EwcConfig = EwcConfig()
    pathweave: PathWeaveConfig = PathWeaveConfig()
    merge: MergeConfig = field(default_factory=MergeConfig)
    evaluate: EvaluateConfig = EvaluateConfig()
    execution: ExecutionConfig = ExecutionConfig()

    def __post_init__(self) -> None:
        """Check ranges, and that the order names each configured modality at most once."""
        for section in ("prompt", "lora", "align", "tune", "realign", "evaluate", "execution"):
            require_ranges(getattr(self, section), section, _RANGES, _FROM_ZERO)
        if self.seed < 0:
            raise InputError(f"seed is {self.seed}; it must be at least 0")
        for name in self.order:
            require_known(name, self.modalities, "order: modality")
        if not self.order:
            raise InputError(f"order is empty; name some of {', '.join(self.modalities)}")
        if len(set(self.order)) != len(self.order):
            raise InputError(f"order names a modality twice: {', '.join(self.order)}")
        if self.tune.lr_backbone is None:
            raise InputError("tune.lr_backbone is missing; tune trains connector and backbone")
        if self.tuning == "full" and self.merge.method != CMA:
            raise InputError(
                f"merge.method={self.merge.method} works on LoRA's deltas, and tuning=full has "
                f"none; use merge.method={CMA}, or tuning=lora"
            )

    def phase(self, name: str) -> PhaseConfig:
        """Return the hyperparameters of `align`, `tune` or `realign`."""
        return {"align": self.align, "tune": self.tune, "realign": self.realign}[name]


_FROM_ZERO = ("workers", "zero", "max_nonfinite_steps", "keep_every")
"""Whole numbers of which 0 means something."""
_RANGES = {
    **dict.fromkeys(("lr_connector", "lr_backbone", "weight_decay"), (0.0, math.inf)),
    **dict.fromkeys(("max_grad_norm", "judge_max_dollars"), (0.0, math.inf)),
    **dict.fromkeys(("warmup_ratio", "dropout"), (0.0, 1.0)),
}


def profile_names() -> list[str]:
    """Return the names of the profiles that come with the package."""
    return sorted(path.stem for path in PROFILES.glob("*.yaml"))


def load_profile(name: str, overrides: typing.Sequence[str] = ()) -> RunConfig:
    """Load a shipped profile by name, or a profile file by path, with `key=value` overrides.

    A profile may hold only what differs from another one, which its key `base` names.
    """
    path = _profile_path(name, Path())
    values = _profile_values(path, ())
    values.setdefault("profile", path.stem)
    return parse(RunConfig, apply_overrides(values, overrides), path.name)


def _profile_path(name: str, folder: Path) -> Path:
    """Return the file of a shipped profile, or of one that `name` gives relative to `folder`."""
    if Path(name).suffix in (".yaml", ".yml"):
        return folder / name
    require_known(name, profile_names(), "profile")
    return PROFILES / f"{name}.yaml"


def _profile_values(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    """Read a profile, with what it takes from its base."""
    if path in above:
        raise InputError(f"{path.name}: its bases lead back to it; give one of them no base")
    values = read_yaml(path)
    base = values.pop("base", None)
    if base is None:
        return values
    inherited = _profile_values(_profile_path(str(base), path.parent), (*above, path))
    return merge_settings(inherited, values, path.name)


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
        inside = any(run.glob("*/config.yaml"))
        remedy = f"make one with 'mera-ds init {run} --profile pocket'"
        raise InputError(
            f"there is no run at {run}; {f'it holds runs: say {run}/*' if inside else remedy}"
        )
    for text in execution:
        section = text.partition(".")[0]
        if section != "execution":
            remedy = "make a new run with 'mera-ds init'"
            if section == "evaluate":
                remedy = f"change it in {path}, and the same command makes the scores anew"
            raise InputError(
                f"'{text}' can't change in an existing run (only execution.* can); {remedy}"
            )
    return parse(RunConfig, apply_overrides(read_yaml(path), execution), str(path))
