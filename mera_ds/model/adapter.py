"""From a product's deltas to a backbone: folded into its weights, or with factors that train."""

from pathlib import Path

from transformers import PreTrainedModel

from mera_ds.checkpoint import load_part
from mera_ds.config import LoraConfig, RunConfig
from mera_ds.deltas import weighted_deltas
from mera_ds.errors import InputError
from mera_ds.manifest import Manifest, require_foldable
from mera_ds.model.backbone import fold_lineage
from mera_ds.model.lora import attach_lora, fold_deltas, set_lora
from mera_ds.model.weave import attach_woven, weave
from mera_ds.plan import Adapter


def restore_backbone(llm: PreTrainedModel, product: Path, manifest: Manifest) -> None:
    """Turn the bare backbone into the product's, with nothing that trains.

    It is θ = θ_base + Σ c_i Δ_i in stage order, or the woven layers of PathWeave.
    """
    if manifest.weave is None:
        fold_lineage(llm, product, manifest)
    else:
        tensors = load_part(product, manifest.weave)
        attach_woven(llm, weighted_deltas(product, manifest), tensors)


def attach_adapter(
    llm: PreTrainedModel,
    product: Path | None,
    manifest: Manifest | None,
    config: RunConfig,
    adapter: Adapter,
) -> None:
    """Turn the bare backbone into the product's, with factors that train (`mera_ds.plan.Adapter`).

    Args:
        llm: the bare backbone.
        product: the model to start from; None: the bare backbone.
        manifest: of the product.
        config: the run's configuration.
        adapter: what trains.

    Raises:
        InputError: if the product's deltas can't go on in this way.
    """
    if product is None or manifest is None:
        if adapter != "new":
            raise InputError(f"adapter '{adapter}' needs a model; learn the first modality")
        attach_lora(llm, config.lora)
        return
    deltas = weighted_deltas(product, manifest)
    if adapter == "woven":
        known = load_part(product, manifest.weave) if manifest.weave is not None else {}
        weave(llm, deltas, config.lora, config.pathweave.inner, known)
        return
    require_foldable(product, manifest)
    if adapter == "carried":
        _require_plain(product, manifest, config.lora)
        *deltas, carried = deltas
    fold_deltas(llm, deltas)
    attach_lora(llm, config.lora)
    if adapter == "carried":
        set_lora(llm, carried)


def _require_plain(product: Path, manifest: Manifest, config: LoraConfig) -> None:
    """Refuse to carry on a delta that doesn't count as it would while it trains."""
    scale = config.alpha / config.rank
    newest = manifest.lineage[-1] if manifest.lineage else None
    if newest is None or newest.layers or newest.weight != scale:
        raise InputError(
            f"{product}: its newest delta does not count {scale:g} in all layers, as it does while "
            "it trains, so it can't be carried on; start from a model that was not re-weighted"
        )
