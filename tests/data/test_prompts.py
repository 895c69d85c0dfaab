"""Token pieces: what a row says, and which of its tokens are supervised."""

from pathlib import Path
from typing import Any

import pytest
from chat_backbones import END, TOKENIZERS
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from mera_ds.config import PromptConfig
from mera_ds.data.prompts import PromptBuilder, TokenPieces
from mera_ds.errors import DataError, InputError
from mera_ds.model.backbone import load_tokenizer

CHAT, PLAIN = PromptConfig(style="chat"), PromptConfig(style="plain")

LLAMA3_SPECIAL = (
    "<|begin_of_text|>",
    "<|eot_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|pad|>",
)
LLAMA3_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}"
    "<|end_header_id|>\n\n{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


@pytest.fixture(scope="module")
def tiny(tiny_template: Path) -> Any:
    """Return the tokenizer of the profile `tiny`: a chat template, no start token."""
    return load_tokenizer(tiny_template / "backbone")


@pytest.fixture
def llama3() -> PreTrainedTokenizerFast:
    """Return bytes as tokens, with the special tokens, template and start token of Llama 3."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: number for number, text in enumerate([*LLAMA3_SPECIAL, *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=LLAMA3_SPECIAL[0],
        eos_token=LLAMA3_SPECIAL[1],
        additional_special_tokens=list(LLAMA3_SPECIAL[2:]),
    )
    fast.chat_template = LLAMA3_TEMPLATE
    return fast


def texts(tokenizer: Any, pieces: TokenPieces) -> tuple[str, str, str]:
    """Return prefix, suffix and answer as text, special tokens included."""
    prefix, suffix, answer = (
        tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        for ids in (pieces.prefix, pieces.suffix, pieces.answer)
    )
    return prefix, suffix, answer


class TestChat:
    def test_with_the_tiny_tokenizer(self, tiny: Any) -> None:
        pieces = PromptBuilder(CHAT, tiny).build("What colour is it?", "red", "x")
        assert texts(tiny, pieces) == (
            "<|user|>",
            "\nWhat colour is it?<|end|><|assistant|>",
            "red<|end|>",
        )

    def test_with_a_tokenizer_like_that_of_llama_3(self, llama3: PreTrainedTokenizerFast) -> None:
        pieces = PromptBuilder(CHAT, llama3).build("Naïve?", "yes, naïve", "x")
        assert texts(llama3, pieces) == (
            "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n",
            "\nNaïve?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
            "yes, naïve<|eot_id|>",
        )
        ids = (*pieces.prefix, *pieces.suffix, *pieces.answer)
        assert ids.count(llama3.bos_token_id) == 1

    @pytest.mark.parametrize("name", ["tiny", "llama3"])
    def test_a_row_is_what_the_template_makes_of_the_whole_conversation(
        self, name: str, request: pytest.FixtureRequest
    ) -> None:
        tokenizer = request.getfixturevalue(name)
        pieces = PromptBuilder(CHAT, tokenizer).build("Which way?", "up and left", "x")
        conversation = [
            {"role": "user", "content": "M\nWhich way?"},
            {"role": "assistant", "content": "up and left"},
        ]
        whole = tokenizer.apply_chat_template(conversation, tokenize=False)
        prefix, suffix, answer = texts(tokenizer, pieces)
        assert f"{prefix}M{suffix}{answer}" == whole

    def test_the_question_may_hold_anything(self, tiny: Any) -> None:
        question = "Is \ue000 it {{ 7 * 7 }} {% raise %}?"
        _, suffix, _ = texts(tiny, PromptBuilder(CHAT, tiny).build(question, "no", "x"))
        assert suffix == f"\n{question}<|end|><|assistant|>"

    def test_a_tokenizer_without_a_template_is_refused(self, tiny: Any) -> None:
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=tiny.backend_tokenizer, eos_token="<|end|>"
        )
        with pytest.raises(InputError, match=r"no chat template; set prompt\.style=plain"):
            PromptBuilder(CHAT, tokenizer)
        assert PromptBuilder(PLAIN, tokenizer).build("q", "a", "x").answer

    def test_a_template_without_the_question_is_refused(
        self, llama3: PreTrainedTokenizerFast
    ) -> None:
        llama3.chat_template = "{{ bos_token }}hello"
        with pytest.raises(InputError, match="leaves out what the user says"):
            PromptBuilder(CHAT, llama3)


SYSTEM = "You see and hear."
QUESTION = "What colour is it, up and left?"
WITH_SYSTEM = ("llama3", "chatml", "qwen3")
ANSWERS = ("red", "a square on a blue ground", "0.5 or 7")


@pytest.fixture(scope="module", params=list(TOKENIZERS))
def named(request: pytest.FixtureRequest) -> tuple[str, Any]:
    """Return a tokenizer in the format of each family of backbones, with its name."""
    return request.param, TOKENIZERS[request.param]()


class TestFamilies:
    @pytest.mark.parametrize("answer", ANSWERS)
    @pytest.mark.parametrize(
        ("name", "system"),
        [*((name, None) for name in TOKENIZERS), *((name, SYSTEM) for name in WITH_SYSTEM)],
    )
    def test_the_pieces_are_those_of_the_whole_conversation_tokenised_in_one_go(
        self, name: str, answer: str, system: str | None
    ) -> None:
        tokenizer = TOKENIZERS[name]()
        pieces = PromptBuilder(PromptConfig(system=system), tokenizer).build(QUESTION, answer, "x")
        marked = TOKENIZERS[name]()
        marked.add_tokens([AddedToken("<medium>", special=True, normalized=False)])
        conversation = [{"role": "system", "content": system}] if system else []
        conversation += [
            {"role": "user", "content": f"<medium>\n{QUESTION}"},
            {"role": "assistant", "content": answer},
        ]
        whole = marked.apply_chat_template(conversation, tokenize=False)
        ids = marked(whole, add_special_tokens=False)["input_ids"]
        place = ids.index(marked.convert_tokens_to_ids("<medium>"))
        assert pieces.prefix == tuple(ids[:place])
        rest = (*pieces.suffix, *pieces.answer)
        assert rest == tuple(ids[place + 1 :][: len(rest)])
        assert tokenizer.decode(ids[place + 1 + len(rest) :]).strip() == ""

    def test_an_answer_ends_as_a_turn_does_whatever_the_end_token_is(
        self, named: tuple[str, Any]
    ) -> None:
        name, tokenizer = named
        builder = PromptBuilder(CHAT, tokenizer)
        pieces = builder.build(QUESTION, "red", "x")
        end = tokenizer.convert_tokens_to_ids(END[name])
        assert pieces.answer[-1] == end
        assert tokenizer.decode(pieces.answer[:-1]).strip() == "red"
        assert set(builder.end_ids) == {end, tokenizer.eos_token_id}
        ids = (*pieces.prefix, *pieces.suffix, *pieces.answer)
        assert ids.count(tokenizer.bos_token_id) == (tokenizer.bos_token_id is not None)

    def test_what_is_asked_is_the_generation_prompt(self, named: tuple[str, Any]) -> None:
        _, tokenizer = named
        pieces = PromptBuilder(CHAT, tokenizer).build(QUESTION, None, "x")
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": f"M\n{QUESTION}"}],
            add_generation_prompt=True,
            tokenize=False,
            enable_thinking=False,
        )
        prefix, suffix, _ = texts(tokenizer, pieces)
        assert f"{prefix}M{suffix}" == prompt

    def test_the_medium_comes_first_in_the_turn_of_the_user(self, named: tuple[str, Any]) -> None:
        _, tokenizer = named
        prefix, suffix, _ = texts(
            tokenizer, PromptBuilder(CHAT, tokenizer).build(QUESTION, "red", "x")
        )
        assert suffix.startswith(f"\n{QUESTION}")
        assert "user" in prefix or prefix.endswith("[INST] ")

    def test_a_system_text_that_the_template_refuses_is_named(self) -> None:
        with pytest.raises(InputError, match=r"Only user and .*leave prompt\.system empty"):
            PromptBuilder(PromptConfig(system=SYSTEM), TOKENIZERS["mistral"]())

    def test_a_template_that_writes_no_special_token_leaves_the_end_token(self) -> None:
        tokenizer = TOKENIZERS["chatml"]()
        tokenizer.chat_template = (
            "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n"
            "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
        )
        pieces = PromptBuilder(CHAT, tokenizer).build(QUESTION, "red", "x")
        assert texts(tokenizer, pieces)[1:] == (
            f"\n{QUESTION}\nassistant:",
            " red<|endoftext|>",
        )

    def test_no_template_writes_the_date_of_the_day(self) -> None:
        tokenizer = TOKENIZERS["llama3"]()
        tokenizer.chat_template = (
            "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}"
            "{% endif %}Today: {{ date_string }}\n" + tokenizer.chat_template
        )
        pieces = PromptBuilder(CHAT, tokenizer).build(QUESTION, "red", "x")
        assert texts(tokenizer, pieces)[0].startswith("Today: 26 Jul 2024\n")


class TestQuestions:
    def test_a_question_can_ask_for_a_short_answer(self, llama3: PreTrainedTokenizerFast) -> None:
        builder = PromptBuilder(PromptConfig(qa_suffix="Be short."), llama3)
        assert builder.ask("What is it?") == "What is it?\nBe short."
        assert PromptBuilder(CHAT, llama3).ask("What is it?") == "What is it?"


class TestBare:
    """LLaVA's stage 1: medium and caption alone."""

    BARE = PromptConfig(align_style="bare", system=SYSTEM)

    def test_align_has_neither_instruction_nor_template(
        self, llama3: PreTrainedTokenizerFast
    ) -> None:
        pieces = PromptBuilder(self.BARE, llama3, "align").build("Caption:", " naïve\n", "x")
        assert texts(llama3, pieces) == ("<|begin_of_text|>", "", "naïve<|eot_id|>")

    def test_it_ends_as_a_turn_does(self, named: tuple[str, Any]) -> None:
        name, tokenizer = named
        builder = PromptBuilder(PromptConfig(align_style="bare"), tokenizer, "align")
        pieces = builder.build("Caption:", "red", "x")
        assert pieces.answer[-1] == tokenizer.convert_tokens_to_ids(END[name])
        assert pieces.prefix == (
            () if tokenizer.bos_token_id is None else (tokenizer.bos_token_id,)
        )

    def test_it_can_end_with_a_newline(self, llama3: PreTrainedTokenizerFast) -> None:
        config = PromptConfig(align_style="bare", align_end="newline")
        pieces = PromptBuilder(config, llama3, "align").build("Caption:", "naïve", "x")
        assert texts(llama3, pieces) == ("<|begin_of_text|>", "", "naïve\n")

    @pytest.mark.parametrize("phase", ["tune", "realign", None])
    def test_no_other_phase_has_it(
        self, phase: str | None, llama3: PreTrainedTokenizerFast
    ) -> None:
        config = PromptConfig(align_style="bare", align_end="newline")
        pieces = PromptBuilder(config, llama3, phase).build("Caption:", "naïve", "x")
        assert pieces == PromptBuilder(CHAT, llama3).build("Caption:", "naïve", "x")


class TestPlain:
    def test_without_a_start_token(self, tiny: Any) -> None:
        pieces = PromptBuilder(PLAIN, tiny).build("Image caption:", "a red square", "x")
        assert texts(tiny, pieces) == ("", " Image caption:", " a red square<|end|>")

    def test_with_a_start_token(self, llama3: PreTrainedTokenizerFast) -> None:
        pieces = PromptBuilder(PLAIN, llama3).build("Caption:", "naïve", "x")
        assert texts(llama3, pieces) == ("<|begin_of_text|>", " Caption:", " naïve<|eot_id|>")


@pytest.mark.parametrize("config", [CHAT, PLAIN], ids=lambda config: config.style)
class TestAnswers:
    def test_only_the_answer_and_the_end_token_are_supervised(
        self, config: PromptConfig, tiny: Any
    ) -> None:
        pieces = PromptBuilder(config, tiny).build("What colour is it?", "red", "x")
        assert pieces.answer[-1] == tiny.eos_token_id
        assert tiny.decode(pieces.answer[:-1]).strip() == "red"

    def test_generation_has_the_same_prompt_and_no_answer(
        self, config: PromptConfig, tiny: Any
    ) -> None:
        builder = PromptBuilder(config, tiny)
        trained, asked = (builder.build("What is it?", answer, "x") for answer in ("red", None))
        assert (asked.prefix, asked.suffix) == (trained.prefix, trained.suffix)
        assert asked.answer == ()

    @pytest.mark.parametrize("answer", ["", "  ", "\n"])
    def test_an_empty_one_is_an_error(self, config: PromptConfig, tiny: Any, answer: str) -> None:
        with pytest.raises(DataError, match=r"set/key#0: the answer .* has no token to learn"):
            PromptBuilder(config, tiny).build("q", answer, "set/key#0")

    def test_a_tokenizer_without_an_end_token_is_refused(
        self, config: PromptConfig, tiny: Any
    ) -> None:
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=tiny.backend_tokenizer)
        with pytest.raises(DataError, match="has no end token"):
            PromptBuilder(config, tokenizer)
