"""Relative gains of the paper (section 5.1): pure functions of a table of scores, in percent.

Two rules that the paper does not state, but that its Table 2 follows: stage 1 counts as 100 %, and
the deviation over stages is the sample one (n - 1).
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from mera_ds.errors import DataError


class GainUndefined(DataError):
    """A gain can't be computed; the message says which score is missing or unusable."""


@dataclass(frozen=True)
class ScoreTable:
    """The scores of one run and those of the experts it is compared with."""

    name: str
    """What messages call the run."""
    order: tuple[str, ...]
    """Modalities in the order they are learnt; stage i learns `order[i - 1]`."""
    scores: Mapping[tuple[int, str, str], float]
    """S^i_{j,k} by (stage i, modality j, task k)."""
    experts: Mapping[tuple[str, str], float]
    """S^sup_{j,k} by (modality j, task k): the score of the expert trained on j alone."""
    incomparable: Mapping[tuple[int, str, str], str] = field(default_factory=dict)
    """Why a score can't be divided by the expert's, by (stage, modality, task)."""

    @property
    def last_stage(self) -> int:
        """Return the last stage with a score; 0 if there is none."""
        return max((stage for stage, _, _ in self.scores), default=0)

    def tasks(self, modality: str) -> list[str]:
        """Return the tasks of a modality that anything was measured on."""
        measured = {task for _, name, task in self.scores if name == modality}
        return sorted(measured | {task for name, task in self.experts if name == modality})

    @property
    def finished_stages(self) -> int:
        """Return how many stages are fully measured; the last one may still be under way."""
        last = self.last_stage
        complete = all(
            self.tasks(modality)
            and all((last, modality, task) in self.scores for task in self.tasks(modality))
            for modality in self.order[:last]
        )
        return last if complete else last - 1


def relative_gain(table: ScoreTable, stage: int, modality: str) -> float:
    """Return Relative Gain^i_j = 1/K sum_k S^i_{j,k} / S^sup_{j,k}, in percent.

    Raises:
        GainUndefined: if a score is missing, or an expert's is missing, 0 or not comparable.
    """
    tasks = table.tasks(modality)
    if not tasks:
        raise GainUndefined(f"{modality} has neither a score nor an expert")
    return 100 * statistics.fmean(_ratio(table, stage, modality, task) for task in tasks)


def backward_gain(table: ScoreTable, stage: int) -> float:
    """Return Bw Relative Gain^i = 1/(i-1) sum_{j<i} Relative Gain^i_j, in percent.

    It measures what is left of the modalities learnt before stage i; 100 at stage 1.

    Raises:
        GainUndefined: as `relative_gain`.
    """
    if stage == 1:
        return 100.0
    return statistics.fmean(
        relative_gain(table, stage, modality) for modality in table.order[: stage - 1]
    )


def forward_gain(table: ScoreTable, stage: int) -> float:
    """Return Fw Relative Gain^i = Relative Gain^i_i, in percent.

    It measures how well stage i learns its own modality; 100 at stage 1.

    Raises:
        GainUndefined: as `relative_gain`.
    """
    if stage == 1:
        return 100.0
    return relative_gain(table, stage, table.order[stage - 1])


def mean_and_deviation(gains: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and the sample standard deviation (n - 1; None for one stage) over stages."""
    deviation = statistics.stdev(gains) if len(gains) > 1 else None
    return statistics.fmean(gains), deviation


@dataclass(frozen=True)
class Mean:
    """A mean over runs, or the reason why there is none."""

    value: float | None
    runs: int
    """Runs that the mean is taken over."""
    total: int
    """Runs that there are; the others have not got so far, or their value is undefined."""
    spread: float | None = None
    """Sample standard deviation of what was averaged."""
    reasons: tuple[str, ...] = ()


def average(parts: Sequence[Mean]) -> Mean:
    """Return the mean of the parts that have a value, each part weighted the same."""
    values = [part.value for part in parts if part.value is not None]
    return Mean(
        value=statistics.fmean(values) if values else None,
        runs=sum(part.runs for part in parts),
        total=sum(part.total for part in parts),
        spread=statistics.stdev(values) if len(values) > 1 else None,
        reasons=tuple(reason for part in parts for reason in part.reasons),
    )


@dataclass(frozen=True)
class Progress:
    """One gain over the stages: of a run, or averaged over seeds and then over orders."""

    stages: tuple[Mean, ...]
    """The gain at stages 1, 2, ...: the points of Figures 2 and 3."""
    finished: int
    """Stages that `mean` and `deviation` are taken over."""
    mean: Mean
    deviation: Mean


def progress(gain: Callable[[ScoreTable, int], float], table: ScoreTable) -> Progress:
    """Return a gain of one run over its stages, with the mean and deviation of Table 2."""
    stages = tuple(_measure(gain, table, stage) for stage in range(1, len(table.order) + 1))
    finished = stages[: table.finished_stages]
    values = [stage.value for stage in finished if stage.value is not None]
    if not values or len(values) < len(finished):
        reasons = tuple(reason for stage in finished for reason in stage.reasons)
        undefined = Mean(None, 0, 1, reasons=reasons)
        return Progress(stages, len(finished), undefined, undefined)
    mean, deviation = mean_and_deviation(values)
    runs = 0 if deviation is None else 1
    return Progress(stages, len(finished), Mean(mean, 1, 1), Mean(deviation, runs, 1))


def average_progress(parts: Sequence[Progress]) -> Progress:
    """Return the mean over runs, or over orders, stage by stage.

    Mean and deviation over the stages are averaged over the parts that got furthest: those over
    fewer stages are not comparable.
    """
    finished = max(part.finished for part in parts)

    def furthest(name: str) -> Mean:
        means: list[Mean] = [getattr(part, name) for part in parts]
        pairs = zip(parts, means, strict=True)
        return average(
            [mean if p.finished == finished else Mean(None, 0, mean.total) for p, mean in pairs]
        )

    length = max(len(part.stages) for part in parts)
    stages = [[part.stages[i] for part in parts if i < len(part.stages)] for i in range(length)]
    return Progress(tuple(map(average, stages)), finished, furthest("mean"), furthest("deviation"))


def _measure(gain: Callable[[ScoreTable, int], float], table: ScoreTable, stage: int) -> Mean:
    if stage > table.last_stage:
        return Mean(None, 0, 1)
    try:
        return Mean(gain(table, stage), 1, 1)
    except GainUndefined as error:
        return Mean(None, 0, 1, reasons=(f"{table.name}, stage {stage}: {error}",))


def expert_warnings(
    experts: Mapping[tuple[str, str], float],
    floors: Mapping[str, Mapping[tuple[str, str], float]],
    tables: Sequence[ScoreTable],
) -> list[str]:
    """Say which experts are a poor upper bound, so that gains over them mislead.

    Args:
        experts: their scores, by (modality, task).
        floors: what can be scored without knowing the modality, by what it is and by (modality,
            task).
        tables: the runs compared with these experts.
    """
    warnings = []
    for (modality, task), expert in experts.items():
        for name, values in floors.items():
            floor = values.get((modality, task))
            if floor is not None and expert <= floor:
                warnings.append(
                    f"The expert of {modality}/{task} ({expert:.3f}) is not above {name} "
                    f"({floor:.3f}): gains on this task say nothing about {modality}."
                )
        stronger = [
            (score, f"{table.name}, stage {key[0]}", bound)
            for table in tables
            if (bound := table.experts.get((modality, task))) is not None
            for key, score in table.scores.items()
            if key[1:] == (modality, task) and score > bound and key not in table.incomparable
        ]
        if stronger:
            best, where, bound = max(stronger)
            warnings.append(
                f"The expert of {modality}/{task} ({bound:.4g}) is weaker than {len(stronger)} "
                f"model(s) compared with it (best: {where}, {best:.4g}): it is no upper bound."
            )
    return warnings


def _ratio(table: ScoreTable, stage: int, modality: str, task: str) -> float:
    key = (stage, modality, task)
    if key not in table.scores:
        raise GainUndefined(f"there is no score of {modality}/{task}")
    if (modality, task) not in table.experts:
        raise GainUndefined(f"there is no expert score of {modality}/{task}")
    if key in table.incomparable:
        raise GainUndefined(f"{modality}/{task}: {table.incomparable[key]}")
    if table.experts[modality, task] <= 0:
        raise GainUndefined(f"the expert of {modality}/{task} scores 0, nothing relates to that")
    return table.scores[key] / table.experts[modality, task]
