"""A small random Llama with a byte-level tokenizer: the backbone of the profile `tiny`."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mera_ds.files import committed_folder
from mera_ds.recipes.tiny import TOPICS

VOCABULARY = 512

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL_TOKENS = ("<|end|>", "<|user|>", "<|assistant|>")


def write_tiny_backbone(folder: Path, seed: int = 0) -> None:
    """Write an HF checkpoint folder: 4 layers of width 64, random weights fixed by the seed."""
    if (folder / "config.json").exists():
        return
    tokenizer = _tokenizer()
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.1,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    with committed_folder(folder) as target:
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)


def _tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE that has learned the words of the recipe `tiny`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SPECIAL_TOKENS[0])
    fast.chat_template = CHAT_TEMPLATE
    return fast


def _texts() -> list[str]:
    texts = []
    for topic in TOPICS:
        texts.append(topic.question)
        for first in topic.first:
            texts += [topic.caption.format(first=first, second=other) for other in topic.second]
            texts += [first, *topic.second]
    return texts
