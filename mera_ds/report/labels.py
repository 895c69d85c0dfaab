"""What the paper calls the methods, and which of them is which one with realigning."""

from collections.abc import Mapping
from dataclasses import dataclass

from mera_ds.config import RunConfig
from mera_ds.report.results import EXPERT


@dataclass(frozen=True)
class MethodName:
    """A method as the tables show it."""

    text: str
    """`{replayed}` and `{realigned}` stand for the shares of data that is trained on again."""
    plain: str | None = None
    """The method that this one is with realigning after every stage."""


# In the order of the tables' rows.
NAMES: Mapping[str, MethodName] = {
    EXPERT: MethodName("Expert"),
    "finetune": MethodName("Fine-Tuning"),
    "replay": MethodName("Replay({replayed})"),
    "ewc": MethodName("EWC"),
    "pathweave": MethodName("PathWeave"),
    "mera": MethodName("MERA({realigned})", plain="merge"),
    "merge": MethodName("Merging"),
    "realign": MethodName("Fine-Tuning + Realign", plain="finetune"),
    "replay+realign": MethodName("Replay({replayed}) + Realign", plain="replay"),
    "ewc+realign": MethodName("EWC + Realign", plain="ewc"),
    "pathweave+realign": MethodName("PathWeave + Realign", plain="pathweave"),
}
ABLATION = ("finetune", "merge", "realign", "mera")
"""The rows of the paper's Table 4."""
_SHARES = ("1%", "10%")
"""Of the data that the paper's methods train on again."""


def method_name(config: RunConfig) -> str:
    """Return what tables call a run's method; one that the paper has not keeps its own name."""
    name = NAMES.get(config.method, MethodName(config.method))
    replay = config.replay
    return name.text.format(replayed=f"{replay.percent:g}%", realigned=f"{replay.realigning:g}%")


def paper_labels() -> list[str]:
    """Return what tables call the paper's methods, in the order of their rows."""
    texts = [name.text for method, name in NAMES.items() if method != EXPERT]
    return list(dict.fromkeys(t.format(replayed=s, realigned=s) for t in texts for s in _SHARES))


def method_rank(method: str) -> int:
    """Return a method's place in the tables; one that the paper has not comes last."""
    return [*NAMES].index(method) if method in NAMES else len(NAMES)


def plain_method(method: str) -> str | None:
    """Return the method that this one is with realigning; None: it is no such method."""
    name = NAMES.get(method)
    return name.plain if name else None
