"""Continual-learning methods (layer 4): each turns an order of modalities into a plan.

A method says how a stage learns its modality; realigning can follow after any of them (paper,
Table 5). MERA is merging, realigned; the paper calls realigned fine-tuning "realigning alone".
"""

from collections.abc import Callable
from functools import partial

from mera_ds.config import RunConfig
from mera_ds.methods import ewc, expert, finetune, merge, pathweave, replay
from mera_ds.methods.steps import Method, plan_stages
from mera_ds.plan import Plan
from mera_ds.settings import require_known

STAGED: dict[str, Method] = {
    "finetune": finetune.METHOD,
    "replay": replay.METHOD,
    "ewc": ewc.METHOD,
    "pathweave": pathweave.METHOD,
    "merge": merge.METHOD,
}
REALIGNED = {name: f"{name}+realign" for name in STAGED} | {"finetune": "realign", "merge": "mera"}
"""What each method is called with realigning after every stage."""

METHODS: dict[str, Callable[[RunConfig], Plan]] = {"expert": expert.plan}
for _name, _method in STAGED.items():
    for _called, _realigned in ((_name, False), (REALIGNED[_name], True)):
        METHODS[_called] = partial(plan_stages, name=_called, method=_method, realigned=_realigned)


def make_plan(config: RunConfig) -> Plan:
    """Return the plan of a run.

    Raises:
        InputError: if the method is unknown.
    """
    require_known(config.method, METHODS, "method")
    return METHODS[config.method](config)
