"""Continual-learning methods (layer 4): each turns an order of modalities into a plan."""

from collections.abc import Callable

from mera_ds.config import RunConfig
from mera_ds.methods import expert, finetune, mera
from mera_ds.plan import Plan
from mera_ds.settings import require_known

METHODS: dict[str, Callable[[RunConfig], Plan]] = {
    "mera": mera.plan,
    "finetune": finetune.plan,
    "expert": expert.plan,
}


def make_plan(config: RunConfig) -> Plan:
    """Return the plan of a run.

    Raises:
        InputError: if the method is unknown.
    """
    require_known(config.method, METHODS, "method")
    return METHODS[config.method](config)
