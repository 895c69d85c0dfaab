"""Varied English sentences for the tokenizers, made from a seed."""

import random
from collections.abc import Callable

SUBJECTS = (
    "A man|Two dogs|the girl|An old woman|Somebody|The U.S. team|Mr. Smith|Dr. Jones's nurse|"
    "a T-shirt|The boys' coach|My brother-in-law|a jack-o'-lantern|St. Mary's choir|Kids|"
    "J. K. Rowling|they|It|A Wi-Fi router|The Ph.D. student|MSNBC|AT&T|an e-mail|O'Brien|"
    "the 1980s band|A 3-D model|No. 5|Sgt. Pepper|a café owner|Señor López|the naïve façade|"
    "Die Straße|Beyoncé|the x-ray"
).split("|")
VERBS = (
    "is riding|isn't holding|can't see|cannot find|won't eat|doesn't like|wanna buy|gotta clean|"
    "gonna wash|should've left|they'd sold|we'll watch|hasn't opened|didn't throw|plays|'tis near|"
    "'twas behind|gimme|lemme fix|d'you know|y'all made|ain't got|mustn't touch|needn't carry|"
    "has (probably) dropped|re-used|over-cooked|is well-known for|looks at|rock'n'rolls with"
).split("|")
OBJECTS = (
    "a surfboard|the skate-park|some ice cream|a 7-foot-tall statue|1,234.56 dollars|$5.99|"
    "£20|€1.50|¥300|50% of it|3/4 of a pizza|1/2 cup|½ cup|2 1/2 cups|10:30 a.m.|5 p.m.|7pm|"
    "the 21st century|2nd place|'n' roll|C++|C#|F#|a .22 rifle|No. 10|page 3-4|a 2x4|-40 °C|"
    '20°|5\'10"|10"|12/25/2014|2014-12-25|555-1234|(555) 123-4567|+1 555 123 4567|'
    "www.example.com|http://example.com/a?b=c|me@example.com|@user|#hashtag|a/b|and/or|"
    "he/she|he's/she's|24/7|H2O|CO2|B-52|iPhone6|MP3s|the '90s|'80s music|1990's|Jan. 5|"
    "Feb. 29|Inc.|Co., Ltd.|etc.|e.g. a|i.e. that|vs. the rest|Washington D.C.|a.k.a. Joe|"
    "U.K.|R&B|Q&A|&amp; more|<b>bold</b>|:-)|;)|:D|<3|^_^|:(|🙂|👍🏽|🎉🎉|❤️|日本|Привет|ελληνικά|"
    "中文字|한국어|ñandú|œuvre|ﬁre|Ⅳ|x²|10⁻³|a—b|yes–no|one...two|wait…|what?!|really??|stop!!!|"
    "\"quoted\"|'single'|“curly”|‘single curly’|«guillemets»|„low“|`back`|``tex''|(round)|"
    "[square]|{curly}|a*b|*starred*|_under_|~tilde|a^b|a=b|<tag>|a|b\\c|~5|±3|×2|÷|≤ 5|"
    "→ there|™ signs|© 2014|®|• point|·|§ 5|¶|†|‰|№ 7|¿qué?|¡sí!"
).split("|")
ENDS = (
    "|.|.|.|!|?|...|…|;|,|:| .| !|.\"|!\"|.'|?'|.)|--|—| - |\n|.  |!?| etc.| Inc.| a.m.| U.S.| no."
).split("|")
GLUE = (
    " | | | | | |, |,|; |: | - |-| -- |--|—|/| / |... |…| & |&| \"|\" | '|' |  |\t|\u00a0"
).split("|")
CONTRACTED = ("'s|'re|'ve|'ll|'d|'m|n't|’s|’re|n’t|’ll|'S|N'T|s'|'em|'til|'cause|o'clock|'").split(
    "|"
)
CASES: tuple[Callable[[str], str], ...] = (str, str, str, str.lower, str.upper, str.title)


def sentences(count: int, seed: int = 0) -> list[str]:
    """Return different sentences: phrases, joined and ended in many ways."""
    generator = random.Random(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        found[_sentence(generator)] = None
    return list(found)


def _sentence(generator: random.Random) -> str:
    parts = [generator.choice(pool) for pool in (SUBJECTS, VERBS, OBJECTS)]
    parts += generator.choices((*OBJECTS, *SUBJECTS), k=generator.randrange(3))
    text = parts[0]
    for part in parts[1:]:
        tail = generator.choice(CONTRACTED) if generator.random() < 0.12 else ""
        text += tail + generator.choice(GLUE) + part
    return generator.choice(CASES)(text) + generator.choice(ENDS)
