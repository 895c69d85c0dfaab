"""The loop that LLaVA and its relatives have: HF's Trainer, padded rows, full logits."""

import time
from collections.abc import Sequence
from tempfile import TemporaryDirectory
from typing import Any

import torch
from synthetic import synchronise
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from mera_ds.batch import Sample
from mera_ds.model.mllm import MultimodalLM

IGNORED = -100
"""Label of what isn't learned."""


class LlavaStyle(nn.Module):
    """The parts of one of our models, put together as LLaVA does."""

    def __init__(self, model: MultimodalLM) -> None:
        super().__init__()
        self.llm = model.llm
        self.projector = model.connectors["image"]
        self._encoder = [model.encoders["image"]]  # in a list: its weights never train

    def forward(
        self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, cut: int
    ) -> dict[str, Tensor]:
        """Return the mean loss of a padded batch; `cut` is where its pictures' tokens begin."""
        with torch.no_grad():
            features = self._encoder[0](list(pixels))
            embeddings = self.llm.get_input_embeddings()(input_ids)
        weight = next(self.projector.parameters())
        media = self.projector(features.values.to(weight.dtype), features.mask)
        media = media.to(embeddings.dtype)
        behind = cut + media.shape[1]
        rows = torch.cat([embeddings[:, :cut], media, embeddings[:, behind:]], dim=1)
        return {
            "loss": self.llm(inputs_embeds=rows, attention_mask=attention_mask, labels=labels).loss
        }

    def collate(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Return equally long samples as one padded batch, on the model's device."""
        count = self._encoder[0].max_tokens
        rows = [
            (*one.prefix_ids, *[0] * count, *one.suffix_ids, *one.answer_ids) for one in samples
        ]
        input_ids = torch.tensor(rows)
        labels = torch.full_like(input_ids, IGNORED)
        answer = len(samples[0].answer_ids)
        labels[:, -answer:] = input_ids[:, -answer:]
        device = self.llm.get_output_embeddings().weight.device
        tensors = {
            "pixels": torch.stack([one.media for one in samples]),
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "labels": labels,
        }
        moved = {name: tensor.to(device) for name, tensor in tensors.items()}
        return {**moved, "cut": len(samples[0].prefix_ids)}


class _Clock(TrainerCallback):
    """When each optimizer step ended."""

    def __init__(self, device: str) -> None:
        self.times: list[float] = []
        self._device = device

    def on_step_end(self, *arguments: Any, **options: Any) -> None:
        """Take the time."""
        synchronise(self._device)
        self.times.append(time.perf_counter())


def train_with_hf(
    loop: LlavaStyle, samples: Sequence[Sample], micro_batches: int, steps: int, *, half: bool
) -> float:
    """Train some optimizer steps of so many micro-batches; return the seconds of the later ones."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    clock = _Clock(device)
    with TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=len(samples),
            gradient_accumulation_steps=micro_batches,
            max_steps=steps,
            learning_rate=1e-6,
            max_grad_norm=1.0,
            fp16=half,
            use_cpu=device == "cpu",
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_num_workers=0,
            dataloader_pin_memory=False,
        )
        Trainer(
            model=loop,
            args=arguments,
            train_dataset=list(samples) * micro_batches * steps,
            data_collator=loop.collate,
            callbacks=[clock],
        ).train()
    return (clock.times[-1] - clock.times[0]) / (len(clock.times) - 1)
