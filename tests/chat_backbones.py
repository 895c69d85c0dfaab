"""Small backbones of the public families: tokenizers, templates and random weights in their format.

The templates are written from the families' documented formats.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

TEXTS = (
    "What colour is it?\nAnswer the question using a single word or phrase.",
    "system\n\nuser\n\nassistant\n\nyou are a helpful assistant.\n<think>\n\n</think>\n\n",
    "Provide a one-sentence caption for the image. a red square on a blue ground, up and left",
)
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = (
    "{% for message in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
CHATML = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN3 = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if loop.last and message['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "[INST] {{ message['content'] }}[/INST]{% elif message['role'] == 'assistant' %}"
    " {{ message['content'] | trim }}{{ eos_token }}{% else %}"
    "{{ raise_exception('Only user and assistant roles are supported') }}{% endif %}{% endfor %}"
)


def byte_level(special: Sequence[str], template: str, **roles: str) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE with Llama 3's way of splitting, trained on a few lines."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=380,
        special_tokens=list(special),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    start = roles.get("bos_token")
    if start is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{start} $A", special_tokens=[(start, tokenizer.token_to_id(start))]
        )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles)
    fast.chat_template = template
    return fast


def llama3() -> PreTrainedTokenizerFast:
    """Return Llama 3's: a start token, `<|eot_id|>` besides the end token, none for padding."""
    special = ("begin_of_text", "end_of_text", "start_header_id", "end_header_id", "eot_id")
    names = [f"<|{name}|>" for name in special]
    return byte_level(names, LLAMA3, bos_token=names[0], eos_token=names[1])


def chatml() -> PreTrainedTokenizerFast:
    """Return Qwen 2.5's base tokenizer: no start token, and an end token that ends no turn."""
    names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    return byte_level(names, CHATML, eos_token=names[0], pad_token=names[0])


def qwen3() -> PreTrainedTokenizerFast:
    """Return Qwen 3's: the template writes an empty thought in front of an answer."""
    names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    return byte_level(names, QWEN3, eos_token=names[2], pad_token=names[0])


def mistral() -> PreTrainedTokenizerFast:
    """Return Mistral's: SentencePiece with byte fallback, a space in front of the first word."""
    letters = sorted({letter for text in TEXTS for letter in text} - {" ", "\n"})
    names = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
    bytes_ = [f"<0x{number:02X}>" for number in range(256)]
    merged = [f"▁{letter}" for letter in letters]
    tokens = [*names, *bytes_, "▁", *letters, *merged]
    vocabulary = {text: number for number, text in enumerate(tokens)}
    merges = [("▁", letter) for letter in letters]
    model = models.BPE(
        vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True
    )
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["[INST]", "[/INST]"],
    )
    fast.chat_template = MISTRAL
    return fast


TOKENIZERS = {"llama3": llama3, "chatml": chatml, "qwen3": qwen3, "mistral": mistral}
END = {"llama3": "<|eot_id|>", "chatml": "<|im_end|>", "qwen3": "<|im_end|>", "mistral": "</s>"}
"""What ends an assistant's turn."""


@dataclass(frozen=True)
class Family:
    """A family of backbones: its tokenizer and its network."""

    tokenizer: str
    config: type[PretrainedConfig]
    model: Any
    settings: dict[str, Any]


FAMILIES = {
    "llama": Family("llama3", LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": False}),
    "llama-tied": Family("llama3", LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True}),
    "qwen2": Family("chatml", Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": True}),
    "qwen3": Family(
        "qwen3", Qwen3Config, Qwen3ForCausalLM, {"tie_word_embeddings": False, "head_dim": 12}
    ),
    "mistral": Family(
        "mistral",
        MistralConfig,
        MistralForCausalLM,
        {"tie_word_embeddings": False, "sliding_window": 16},
    ),
}
WIDTH = 32


def write_backbone(folder: Path, name: str) -> Path:
    """Write an HF checkpoint folder of a family: random weights and its kind of tokenizer."""
    family = FAMILIES[name]
    tokenizer = TOKENIZERS[family.tokenizer]()
    config = family.config(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **family.settings,
    )
    torch.manual_seed(0)
    model = family.model(config)
    for parameter in model.parameters():  # biases and norms are constant otherwise
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=float(parameter.detach().mean()), std=0.3)
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(END[family.tokenizer])]
    # As published: settings for sampling, and penalties, which greedy decoding must not inherit.
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.6, top_p=0.9, repetition_penalty=1.7, eos_token_id=ends
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
