"""What the paper asks its judge (appendix C, Table 8), and how the reply is read."""

import ast
import json
import math
import re
from typing import Any

from mera_ds.evaluate.judge import JudgeItem, Judgement
from mera_ds.files import sha256_json

# The table breaks the line at the hyphen of the first "question-answer"; it is kept here.
SYSTEM_PROMPT = """\
You are an intelligent chatbot designed for evaluating the correctness of generative outputs for \
question-answer pairs. Your task is to compare the predicted answer with the correct answer and \
determine if they match meaningfully. Here's how you can accomplish the task:

##INSTRUCTIONS:

- Focus on the meaningful match between the predicted answer and the correct answer.
- Consider synonyms or paraphrases as valid matches.
- Evaluate the correctness of the prediction compared to the answer."""
USER_PROMPT = """\
Please evaluate the following question-answer pair:

Question: <question>
Correct Answer: <answer>
Predicted Answer: <prediction>

Provide your evaluation only as a yes/no and score where the score is an integer value between 0 \
and 5, with 5 indicating the highest meaningful match. Please generate the response in the form of \
a Python dictionary string with keys 'pred' and 'score', where value of 'pred' is a string of \
'yes' or 'no' and value of 'score' is in INTEGER, not STRING.DO NOT PROVIDE ANY OTHER OUTPUT TEXT \
OR EXPLANATION. Only provide the Python dictionary string. For example, your response should look \
like this: {'pred': 'yes', 'score': 4.8}."""
PROMPT_VERSION = sha256_json([SYSTEM_PROMPT, USER_PROMPT])


def fill_prompt(item: JudgeItem) -> str:
    """Return the user message; several accepted answers are joined by "or".

    Each value becomes one line and is not itself searched for placeholders, so a prediction cannot
    add lines to the form.
    """
    values = {
        "<question>": item.question,
        "<answer>": joined_answers(item),
        "<prediction>": item.prediction,
    }
    return re.sub("|".join(values), lambda match: " ".join(values[match[0]].split()), USER_PROMPT)


def joined_answers(item: JudgeItem) -> str:
    """Return the accepted answers as one text."""
    return " or ".join(dict.fromkeys(answer for answer in item.answers if answer.strip()))


def parse_reply(reply: str) -> Judgement | None:
    """Read `{'pred': 'yes', 'score': 4.8}`, as JSON or Python, bare or in a code fence.

    Scores are cut to integers, as in the script the prompt comes from. Returns None for anything
    else: text around the dictionary, another verdict, a score outside 0 to 5.
    """
    text = re.sub(r"^```\w*\s*|\s*```$", "", reply.strip())
    value = _literal(text) if len(text) < 1000 else None
    if not isinstance(value, dict):
        return None
    verdict, score = value.get("pred"), value.get("score")
    if isinstance(score, str) and re.fullmatch(r"\d(\.\d+)?", score):
        score = float(score)
    if isinstance(score, bool) or not isinstance(score, int | float) or not 0 <= score <= 5:
        return None
    match verdict.strip().lower() if isinstance(verdict, str) else None:
        case "yes":
            return Judgement("yes", math.floor(score), text)
        case "no":
            return Judgement("no", math.floor(score), text)
    return None


def _literal(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
