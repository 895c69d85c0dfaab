"""The peer of `benchmarks/training.py`: HF `Trainer` with PEFT, as LLaVA's scripts train.

Collated media, padded rows with a mask, logits of every position, gradient checkpointing.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments

from benchmarks.training_problem import (
    RATE,
    Marks,
    Problem,
    load_llm,
    lora_config,
    make_connector,
    make_loader,
    tokens,
)
from mera_ds.batch import Sample
from mera_ds.distributed import World
from mera_ds.model.build import seed_everything
from mera_ds.model.lora import linear_layers

IGNORED = -100


class LlavaStyle(nn.Module):
    """Embeds the ids, puts the medium's tokens in their place, and leaves the loss to HF."""

    def __init__(self, llm: nn.Module, connector: nn.Module, prefix: int) -> None:
        super().__init__()
        self.llm: Any = llm
        self.connector = connector
        self._prefix = prefix

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor,
        media: Tensor,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return HF's output of the whole rows, loss included."""
        seen = torch.ones(media.shape[:2], dtype=torch.bool)
        media_BKD = self.connector(media, seen)
        text_BTD = self.llm.get_input_embeddings()(input_ids)
        cut = self._prefix
        embeddings = torch.cat([text_BTD[:, :cut], media_BKD, text_BTD[:, cut:]], dim=1)
        extra = dict(num_items_in_batch=num_items_in_batch) if num_items_in_batch else {}
        return self.llm(
            inputs_embeds=embeddings, attention_mask=attention_mask, labels=labels, **extra
        )


class Rows(Dataset[Sample]):
    """The samples in our loader's order."""

    def __init__(self, samples: list[Sample]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, place: int) -> Sample:
        return self.samples[place]


def collate(samples: list[Sample]) -> dict[str, Tensor]:
    """Pad rows on the right."""
    kept = len(samples[0].media)
    ids = [torch.tensor(s.prefix_ids + s.suffix_ids + s.answer_ids) for s in samples]
    labels = [
        torch.tensor([IGNORED] * (s.text_tokens + kept - len(s.answer_ids)) + list(s.answer_ids))
        for s in samples
    ]
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
        "attention_mask": pad_sequence([torch.ones(len(row)) for row in labels], batch_first=True),
        "media": torch.stack([sample.media for sample in samples]),
    }


class InOrder(Trainer):
    """Takes the samples as they come."""

    def _get_train_sampler(self, dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(dataset if dataset is not None else self.train_dataset)


@dataclass
class Watch(TrainerCallback):
    """Notes the time at each step."""

    marks: Marks

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Begin a step."""
        self.marks.take()

    def on_step_end(self, arguments: Any, state: Any, *_: Any, **__: Any) -> None:
        """Note the end of the last step."""
        if state.global_step == state.max_steps:
            self.marks.take()


def train_peer(folder: Path, work: Path, problem: Problem, checkpointing: bool) -> dict[str, Any]:
    """Train the problem with HF; return seconds and losses."""
    loader = make_loader(problem, World(0, 1, 0))
    samples = [one for step in range(problem.steps) for b in loader[step] for one in b.samples]
    llm = load_llm(folder, checkpointing)
    ours = lora_config(problem)
    seed_everything("lora")
    adapted = get_peft_model(
        llm,
        LoraConfig(
            r=ours.rank, lora_alpha=int(ours.alpha), target_modules=list(linear_layers(llm))
        ),
    )
    model = LlavaStyle(adapted, make_connector(problem), len(samples[0].prefix_ids))
    watch = Watch(Marks([], []))
    arguments = TrainingArguments(
        output_dir=str(work / "hf"),
        per_device_train_batch_size=problem.batch,
        max_steps=problem.steps,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_num_workers=0,
    )
    trainer = InOrder(
        model=model,
        args=arguments,
        train_dataset=Rows(samples),
        data_collator=collate,
        callbacks=[watch],
    )
    trainer.train()
    cpu, wall = watch.marks.spent()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return {"cpu": cpu, "wall": wall, "tokens": tokens(problem, loader), "losses": losses}
