"""Online EWC (paper, appendix D): hold the factors that older modalities depend on.

Before stage i the Fisher information of the stage before is measured on a random share of its data
D_{i−1}, as the mean over samples of the squared gradient, and added to that of older stages:

    F̄_{i−1} = γ·F̄_{i−2} + F_{i−1} ,      L*(θ_i) = L(θ_i) + λ/2 · Σ F̄_{i−1} (θ_i − θ_{i−1})²

(γ = 1 and λ = 1 in the paper). So that θ means the same numbers in all stages, one pair of LoRA
factors is carried on through them instead of a new pair on a folded backbone. Connectors are not
penalised: those of older modalities do not change, and a new one has no past.
"""

from mera_ds.config import RunConfig
from mera_ds.methods.steps import Method, fisher_folder, learn, measure_fisher
from mera_ds.plan import DataPart, Penalty, Step


def _write_stage(config: RunConfig, stage: int, previous: str | None, output: str) -> list[Step]:
    """Return the Fisher information of the stage before, align, and the penalised tune."""
    modality = config.order[stage - 1]
    if previous is None:
        return [*learn(config, stage, modality, previous, output)]
    fisher = measure_fisher(
        config,
        stage,
        previous,
        DataPart(modality=config.order[stage - 2], percent=config.ewc.percent),
        previous=fisher_folder(config, stage - 1) if stage > 2 else None,
        decay=config.ewc.decay,
    )
    penalty = Penalty(source=fisher.output, strength=config.ewc.strength)
    learned = learn(config, stage, modality, previous, output, adapter="carried", penalty=penalty)
    return [fisher, *learned]


METHOD = Method(_write_stage, product="tuned")
