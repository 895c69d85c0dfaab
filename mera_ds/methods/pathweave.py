"""PathWeave (paper, section 5.1 and appendix D; arXiv 2410.20178): adapters in adapters.

The first stage learns an ordinary pair of LoRA factors. A later stage m keeps the pairs of all
stages before, frozen, and learns a new pair A_m, an in-adapter F_j inside each old one, and noisy
dense gates g over all m of them (see `mera_ds.model.weave`):

    y = W x + Σ_{j<m} g_j(x) · B_j F_j A_j x + g_m(x) · B_m A_m x

Nothing is ever folded into the backbone: it grows by one pair per modality. As in the paper (its
footnote 3), the newest stage's gates serve all modalities.
"""

from mera_ds.config import RunConfig
from mera_ds.methods.steps import Method, learn
from mera_ds.plan import Adapter, Step


def _write_stage(config: RunConfig, stage: int, previous: str | None, output: str) -> list[Step]:
    """Return align and tune; from the second stage on the adapters are woven."""
    adapter: Adapter = "new" if stage == 1 else "woven"
    return [*learn(stage, config.order[stage - 1], previous, output, adapter=adapter)]


METHOD = Method(_write_stage, product="tuned")
