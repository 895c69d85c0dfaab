"""From a question and an answer to token pieces; labels follow from the pieces.

A row is  prefix · medium · suffix · answer · end.  The pieces are tokenised one by one, so that
the supervised span is known by construction and no second tokenisation has to agree with it.
"""

from dataclasses import dataclass
from typing import Any

from mera_ds.config import PromptConfig
from mera_ds.errors import DataError, InputError

MEDIUM = "\ue000"
"""A private-use character that stands for the medium while the chat template is rendered."""


@dataclass(frozen=True)
class TokenPieces:
    """Token ids of one row, medium not included."""

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    answer: tuple[int, ...]


class PromptBuilder:
    """Turns texts into token pieces in one of the two styles of `PromptConfig`."""

    def __init__(self, config: PromptConfig, tokenizer: Any) -> None:
        self._config = config
        self._tokenizer = tokenizer
        if tokenizer.eos_token_id is None:
            raise DataError("the tokenizer has no end token (eos_token); add one to its folder")
        if config.style == "chat" and not tokenizer.chat_template:
            raise InputError(
                "prompt.style is chat, but the backbone's tokenizer has no chat template; "
                "set prompt.style=plain"
            )

    def build(self, question: str, answer: str | None, where: str) -> TokenPieces:
        """Return the token ids of one sample.

        Args:
            question: instruction or question.
            answer: the supervised text; None for generation.
            where: name of the sample, for messages.

        Raises:
            DataError: if the answer has no token.
        """
        prefix, suffix = self._frame(question)
        target: tuple[int, ...] = ()
        if answer is not None:
            target = self._ids(self._spaced(answer))
            if not target or not answer.strip():
                raise DataError(f"{where}: the answer {answer!r} has no token to learn from")
            target = (*target, int(self._tokenizer.eos_token_id))
        return TokenPieces(self._start() + self._ids(prefix), self._ids(suffix), target)

    def _frame(self, question: str) -> tuple[str, str]:
        if self._config.style == "plain":
            return "", f" {question}"
        rendered = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": f"{MEDIUM}\n{question}"}],
            add_generation_prompt=True,
            tokenize=False,
        )
        prefix, found, suffix = rendered.partition(MEDIUM)
        if not found:
            raise InputError(
                "the tokenizer's chat template leaves out what the user says; "
                "set prompt.style=plain"
            )
        return prefix, suffix

    def _spaced(self, answer: str) -> str:
        return f" {answer}" if self._config.style == "plain" else answer

    def _start(self) -> tuple[int, ...]:
        """The start token in plain style; a chat template writes its own."""
        start = self._tokenizer.bos_token_id
        return (int(start),) if self._config.style == "plain" and start is not None else ()

    def _ids(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer(text, add_special_tokens=False)["input_ids"])
