"""From a question and an answer to token pieces; labels follow from the pieces.

A row is  prefix · medium · suffix · answer · end.  The pieces are tokenised one by one, so that
the supervised span is known by construction and no second tokenisation has to agree with it.
"""

import functools
from dataclasses import dataclass
from typing import Any, Literal

import jinja2

from mera_ds.config import PromptConfig
from mera_ds.errors import DataError, InputError
from mera_ds.shards.format import Text

MEDIUM = "\ue000"
"""A private-use character that stands for the medium while the chat template is rendered."""
ANSWER = "\ue001"
"""One that stands for what the assistant says."""

TEMPLATE_SETTINGS = {"enable_thinking": False, "date_string": "26 Jul 2024"}
"""Qwen3 answers at once; Llama 3.1 and later write a date, which must not be that of the day."""

FRAMES_KEPT = 4096
"""How many questions' token ids are remembered; a tokenizer takes longer than all else here."""

Style = Literal["chat", "plain", "bare"]


@dataclass(frozen=True)
class TokenPieces:
    """Token ids of one row, medium not included."""

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    answer: tuple[int, ...]

    def __len__(self) -> int:
        """Return the number of tokens of all pieces."""
        return len(self.prefix) + len(self.suffix) + len(self.answer)


class PromptBuilder:
    """Turns texts into token pieces in the styles of `PromptConfig`.

    `chat` is the tokenizer's own template, with the medium at the start of the user's turn;
    `plain` is medium, question, answer; `bare` is medium, answer (LLaVA's stage 1).
    """

    def __init__(self, config: PromptConfig, tokenizer: Any, phase: str | None = None) -> None:
        """Learn how the tokenizer's template ends an assistant's turn.

        Args:
            config: the run's prompt settings.
            tokenizer: the backbone's.
            phase: which phase the rows are for, since `align` may have a style of its own.

        Raises:
            DataError: if the tokenizer has no end token.
            InputError: if its chat template is missing, or can't express the settings.
        """
        self._config = config
        self._tokenizer = tokenizer
        if tokenizer.eos_token_id is None:
            raise DataError("the tokenizer has no end token (eos_token); add one to its folder")
        self._eos = int(tokenizer.eos_token_id)
        bare = phase == "align" and config.align_style == "bare"
        self._style: Style = "bare" if bare else config.style
        self._space = ""
        end: tuple[int, ...] = (self._eos,)
        if config.style == "chat":
            if not tokenizer.chat_template:
                raise InputError(
                    "prompt.style is chat, but the backbone's tokenizer has no chat template; "
                    "set prompt.style=plain"
                )
            self._space, end = self._learn_turn()
        self.end_ids = tuple(sorted({end[-1], self._eos}))
        """Tokens that end a generated text."""
        self._framed = functools.lru_cache(maxsize=FRAMES_KEPT)(self._frame_ids)
        newline = bare and config.align_end == "newline"
        self._end = self._ids("\n") if newline else end

    def build(self, question: str, answer: str | None, where: str) -> TokenPieces:
        """Return the token ids of one sample.

        Args:
            question: instruction or question; the style `bare` leaves it out.
            answer: the supervised text; None for generation.
            where: name of the sample, for messages.

        Raises:
            DataError: if the answer has no token.
        """
        prefix, suffix = self._framed(question)
        target: tuple[int, ...] = ()
        if answer is not None:
            text = answer.strip()
            target = self._ids(self._lead() + text)
            if not target or not text:
                raise DataError(f"{where}: the answer {answer!r} has no token to learn from")
            target = (*target, *self._end)
        return TokenPieces(prefix, suffix, target)

    def build_text(
        self, text: Text, caption_prompt: str, where: str, supervised: bool = True
    ) -> TokenPieces:
        """Return the token ids of a shard set's text: a caption's instruction, or a question.

        Args:
            text: the text; its first answer is learned.
            caption_prompt: the modality's instruction for captions.
            where: name of the sample, for messages.
            supervised: with the answer (training), or without (generation).

        Raises:
            DataError: if the text has no answer, or one without a token.
        """
        if not text.answers:
            raise DataError(f"{where} has no answer; rebuild the shard set")
        question = caption_prompt if text.task == "caption" else self.ask(text.question)
        return self.build(question, text.answers[0] if supervised else None, where)

    def ask(self, question: str) -> str:
        """Return a question of the task QA with the configured request for a short answer."""
        suffix = self._config.qa_suffix
        return question if suffix is None else f"{question}\n{suffix}"

    def _frame_ids(self, question: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the token ids in front of the medium, and between it and the answer."""
        prefix, suffix = self._frame(question)
        return prefix, self._ids(suffix)

    def _frame(self, question: str) -> tuple[tuple[int, ...], str]:
        """Return the token ids in front of the medium, and the text between it and the answer."""
        if self._style == "chat":
            prefix, suffix, _ = self._render(question)
            # A template writes its own start token, so that none is added.
            ids = self._tokenizer(prefix, add_special_tokens=False)["input_ids"]
            return tuple(ids), suffix.removesuffix(self._space)
        start = self._tokenizer.bos_token_id
        text = f" {question}" if self._style == "plain" else ""
        return (() if start is None else (int(start),)), text

    def _lead(self) -> str:
        """Return the space in front of an answer."""
        return {"chat": self._space, "plain": " ", "bare": ""}[self._style]

    def _render(self, question: str) -> tuple[str, str, str]:
        """Return what the template writes before the medium, from there to the answer, and after.

        What stands before the answer is what the model is given when it has to speak: where a
        template's generation prompt differs from it (an empty thought of Qwen3, for instance),
        training and generation still agree.
        """
        messages = [
            *self._opening(question),
            {"role": "assistant", "content": ANSWER},
        ]
        text = self._apply(messages, add_generation_prompt=False)
        # The question may hold the marks, too: the medium's is the first, the answer's the last.
        prefix, found, rest = text.partition(MEDIUM)
        suffix, answered, tail = rest.rpartition(ANSWER)
        if not found or not answered:
            raise InputError(
                "the tokenizer's chat template leaves out what the user says or what the "
                "assistant says; set prompt.style=plain"
            )
        return prefix, suffix, tail

    def _opening(self, question: str) -> list[dict[str, str]]:
        system = self._config.system
        first = [] if system is None else [{"role": "system", "content": system}]
        return [*first, {"role": "user", "content": f"{MEDIUM}\n{question}"}]

    def _apply(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    messages,
                    add_generation_prompt=add_generation_prompt,
                    tokenize=False,
                    **TEMPLATE_SETTINGS,
                )
            )
        except jinja2.TemplateError as error:
            raise InputError(
                f"the tokenizer's chat template refuses the conversation ({error}); if it knows "
                "no system text, leave prompt.system empty, otherwise set prompt.style=plain"
            ) from None

    def _learn_turn(self) -> tuple[str, tuple[int, ...]]:
        """Return the space that belongs to an answer, and the tokens that end it.

        The end is what the template writes behind the assistant's text, up to its first special
        token: `<|eot_id|>` of Llama 3, whose end token may be another one. A template that writes
        none there leaves the end token.
        """
        prefix, suffix, tail = self._render("?")
        prompt = self._apply(self._opening("?"), add_generation_prompt=True)
        space = f"{prefix}{MEDIUM}{suffix}".removeprefix(prompt)
        known = self._tokenizer.added_tokens_decoder.items()
        special = {number for number, token in known if token.special}
        special |= set(self._tokenizer.all_special_ids)
        ids = self._ids(tail)
        last = next((place for place, number in enumerate(ids) if number in special), None)
        end = (self._eos,) if last is None else ids[: last + 1]
        return ("" if space.strip() else space), end

    def _ids(self, text: str) -> tuple[int, ...]:
        """Tokenise a piece from the middle of a row.

        The end token in front keeps SentencePiece tokenizers from putting the space there that
        they put before the first word of a text.
        """
        ids = self._tokenizer(self._tokenizer.eos_token + text, add_special_tokens=False)
        return tuple(ids["input_ids"][1:])
