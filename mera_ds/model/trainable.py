"""Which parameters train: named sets, chosen by name, checked as sets.

`connector:<modality>` is one connector; `lora` is all LoRA factors of the backbone and, where they
are woven, the in-adapters and gates beside them.
"""

from collections.abc import Collection

from torch import nn

from mera_ds.model.lora import lora_parameters
from mera_ds.model.mllm import MultimodalLM
from mera_ds.model.weave import woven_parameters
from mera_ds.plan import LORA, connector_set
from mera_ds.settings import require_known


def parameter_sets(model: MultimodalLM) -> dict[str, dict[str, nn.Parameter]]:
    """Return every trainable set that the model has, as names and parameters.

    Connector parameters have the names of their files; LoRA factors those of the delta file.
    """
    sets = {
        connector_set(modality): dict(connector.named_parameters())
        for modality, connector in model.connectors.items()
    }
    lora = lora_parameters(model.llm) | woven_parameters(model.llm)
    return {**sets, LORA: lora} if lora else sets


def set_trainable(
    model: MultimodalLM, names: Collection[str]
) -> dict[str, dict[str, nn.Parameter]]:
    """Freeze everything, then thaw the named sets; return them.

    Raises:
        InputError: if the model has no set of that name.
    """
    sets = parameter_sets(model)
    model.requires_grad_(False)
    for name in names:
        require_known(name, sets, "trainable set")
        for parameter in sets[name].values():
            parameter.requires_grad_(True)
    chosen = {name: sets[name] for name in names}
    thawed = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    meant = [id(parameter) for entry in chosen.values() for parameter in entry.values()]
    assert sorted(thawed) == sorted(meant), "trainable sets must not share parameters"
    return chosen
