"""Whether the texts of a shard set fit a run: something to learn from, and room for the medium."""

from pathlib import Path

from mera_ds.data.prompts import PromptBuilder
from mera_ds.errors import DataError
from mera_ds.shards.reader import ShardReader

_SHOWN = 100
"""Problems that are listed of a folder; the rest is counted."""


def text_problems(
    folder: Path,
    prompts: PromptBuilder,
    caption_prompt: str,
    medium_tokens: int,
    max_length: int,
) -> list[str]:
    """Return one line for each text of a complete shard folder that a run can't use.

    What is in quarantine is left out, as in training.

    The rows are those of training: prefix, medium, suffix, answer, end. Labels stand on answer
    and end alone, so a text is good if its answer has a token, and if the row fits.

    Args:
        folder: `<dataset>/train` or `test`.
        prompts: the run's prompts, with its tokenizer.
        caption_prompt: the modality's instruction for captions.
        medium_tokens: most tokens of a medium behind the connector.
        max_length: `prompt.max_length`.
    """
    problems = []
    with ShardReader(folder) as reader:
        for position in reader.index.usable.tolist():
            sample = reader.samples[position]
            for text in reader.read_texts(position):
                where = f"{folder}: {sample.key}#{text.id}"
                try:
                    row = prompts.build_text(text, caption_prompt, where)
                except DataError as error:
                    problems.append(str(error))
                    continue
                length = len(row) + medium_tokens
                if length > max_length:
                    problems.append(
                        f"{where} is {length} tokens long, {medium_tokens} of them for the medium, "
                        f"more than prompt.max_length={max_length}; raise it or shorten the text"
                    )
    if len(problems) > _SHOWN:
        problems[_SHOWN:] = [f"{folder}: {len(problems) - _SHOWN} more texts do not fit"]
    return problems
