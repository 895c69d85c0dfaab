"""Penn Treebank tokens of captions, as pycocoevalcap makes them, without Java.

pycocoevalcap splits captions with Stanford's `PTBTokenizer` 3.4.1, lower-cases the tokens and drops
those in a list of punctuation. `tokenize` does the same in Python: like the original it scans from
left to right and takes the longest match of a set of patterns, the first of them in a tie. It knows
nothing of letters added to Unicode after 2012 or of the rarer signs and scripts.
"""

import re
import unicodedata

_ABBREVIATIONS = (
    "adj adm adv alex assoc asst atty ave brig capt cf cie cmdr col comdr cpl del dept det "
    "dr drs elec ens ft gen gov govs hon insp invt jos lieut lt maj messrs mlle mme mr mrs "
    "ms msgr mt natl pfc ph pres prof profs pvt rep reps rev sen sens sfc sgt spc st ste "
    "supt supts treas vs wm"
)
# Those that may end a sentence. Of the last ones, letters in brackets are of that case only.
_FINAL_ABBREVIATIONS = (
    "al ala apr ariz assn aug bancorp bhd bldg blvd bros calif co colo conn corp cos ct dak "
    "dec esq est etc ext feb fla fri ga inc ind intl jan jr jul jun kan kans ky ltd mar md "
    "mich minn mo mon mont neb nev nov oct okla penn plc rd rt sep sept seq sq sr sys tel "
    "tenn thu thurs tue tues univ va vt wed wis wisc wyo ph\\.d cont'd p?pt(?-i:[ye])s? "
    "m(?-i:[ft])g (?-i:A)rk (?-i:A)z (?-i:D)el (?-i:I)ll (?-i:L)a (?-i:M)ass (?-i:M)iss "
    "(?-i:O)re (?-i:P)a (?-i:T)ex (?-i:W)ash"
)
_NUMBERED_ABBREVIATIONS = "art ca fig figs no nos op pp prop"
_SENTENCE_STARTS = (
    "a about according additionally after an as at but earlier he her here however if in it last "
    "many more mr\\. ms\\. now once one other our she since so some such that the their then "
    "there these they this we what when while yet you"
)


def _any_of(words: str) -> str:
    return "(?:" + "|".join(words.split()) + ")"


# Names in the patterns: L letter, W letter or digit, A apostrophe, Q apostrophe or quote. Letters
# are what the original takes for one: not `²`, `½`, `Ⅳ`, `①` or characters beyond 16 bits, but
# combining marks and accents written as HTML entities.
_MARKS = "".join(
    chr(code)
    for code in range(0x2C0, 0x1000)
    if unicodedata.category(chr(code)) in ("Mn", "Mc", "Sk")
)
_L = (
    rf"(?:[^\W\d_²³¹¼-¾⁰⁴-⁹₀-₉⅐-↏①-⓿❶-➓〇〡-〩〸-〺\U00010000-\U0010ffff]|[{_MARKS}]"
    "|&[aeiouAEIOU](?:acute|grave|uml);)"
)
_W = rf"(?:{_L}|\d)"
_A = "(?:['’]|&apos;)"
_Q = "(?:['’‘`]|&apos;)"
_WORD = rf"{_L}{_W}*(?:[.!?]{_L}{_W}*)*"
_ACRONYM = r"[A-Za-z](?:\.[A-Za-z])+"
_COMPOUND = rf"[A-Za-z0-9][A-Za-z0-9.,]*(?:[-\u2010\u2011](?:{_ACRONYM}\.|[A-Za-z0-9]+))+"
_PART = rf"(?:[dDoOlL]{_Q}{_W})?{_W}+"
_JOINED = rf"{_PART}(?:[-_]{_PART})+"
_FINAL = rf"(?i:{_any_of(_FINAL_ABBREVIATIONS)})\."
_AMPERSAND = r"[A-Z]+(?:(?:[&+]|&amp;)[A-Z]+)+"
_NUMBER = r"[-+]?(?:\d*(?:[.:,]\d+)+|\d+)"
_NOT = rf"[nN]{_Q}[tT]"
_SUFFIX = rf"{_A}(?:[msdMSD]|[rR][eE]|[vV][eE]|[lL][lL])"
_SLASH_PART = "[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}"
_NAME = "[A-Za-z][A-Za-z0-9_:.-]*"
_ATTRIBUTE = rf"{_NAME}(?: *= *(?:'[^']*'|\"[^\"]*\"))?"
_MARKUP = rf"<(?:[!?][A-Za-z-][^>]*|/?{_NAME}(?: +{_ATTRIBUTE})*[ /]*)>"
_URL = r"[^\s\"<>|(){}]"
_URL_END = r"[^\s\"<>|(){}.!?,-]"
_HOST = r"[^\sA-Z0-9\"'`<>|(){}!?$,./:;=@\[\\\]^_-]+"
_AREA = "[0-9]{2,4}[- ]"
_FACE = "[-^x=~<>']"
_SYMBOLS = (
    r"$%&*<>=\\^|~#@_+/\[\](){}¡-©¬®-´¶-¹¼-¿×÷‖‗‚„-•‣‰-‸※‾-⁂⁄⁺-⁾₊-₎₤€₠ก-๛"
    r"\u2100-\u214f⅓⅔⅕-⅞←-\u2bff、。〒・！-／：-＠［-｀｛-･￠￡￥￦"
)

# The first group is the token. What a pattern matches behind it counts for "longest" only.
_PATTERNS = [
    re.compile(pattern)
    for pattern in (
        # Mark-up
        rf"({_MARKUP})",
        # Words, and the two halves of contracted ones
        "('[tT])(?:[iI][sS]|[wW][aA][sS])",
        "(?i:(can)not)",
        "(?i:(gon|wan)na)",
        "(?i:(got)ta)",
        "(?i:(lem|gim)me)",
        rf"([A-Za-z]*[A-MO-Za-mo-z]){_NOT}",
        rf"({_WORD}){_SUFFIX}",
        rf"({_WORD})",
        rf"([A-HJ-XZn]{_Q}{_L}{{2,}})",
        rf"(?P<clitic>{_NOT}|{_SUFFIX})[^A-Za-z]",
        # Words with an apostrophe
        rf"({_A}[nN]{_A}?|[lLdDjJ]{_A}|{_A}[2-9]0[sS])",
        rf"(?i:((?:dunkin|somethin|ol){_A}|{_A}(?:em|till?|cause)|c{_A}(?:mon|est)|s{_A}mores"
        rf"|nor{_A}easter|li{_A}l|ev{_A}ry|nat{_A}l|e{_A}er|o{_A}o))",
        rf"({_A}\d\d)\s",
        rf"(?P<dropped>'){_L}\S",
        rf"(?P<clitic>{_NOT}|{_SUFFIX})",
        rf"([yY]{_A}){_L}",
        rf"([dDoOlL]{_Q}{_W}{{2,}})",
        rf"({_L}+[aeiouyAEIOUY]{_Q}[aeiouA-Z]{_L}*)",
        # Compounds and abbreviations
        rf"({_W}+)",
        rf"({_FINAL})[\s\S]{{2}}",
        rf"({_COMPOUND})",
        rf"({_JOINED})",
        rf"({_AMPERSAND})",
        rf"((?:{_WORD}|{_W}+|{_COMPOUND}|{_JOINED}|{_AMPERSAND}|{_NUMBER})\.)[,;:]",
        rf"(?i:({_any_of(_ABBREVIATIONS)}\.))",
        rf"({_FINAL}|(?:{_ACRONYM}|[A-Za-z])\.)",
        rf"(?i:({_any_of(_NUMBERED_ABBREVIATIONS)}\.)) ?\d",
        rf"([A-Za-z])\. (?:(?=[A-Z])(?i:{_any_of(_SENTENCE_STARTS)})|{_MARKUP})\s",
        rf"({_SLASH_PART}(?:\\?/{_SLASH_PART}){{1,2}})",
        # Numbers: plain, versions, powers, fractions, dates, telephone numbers
        rf"({_NUMBER})",
        r"((?:\d+\.)+[xX])[\s.,!?]",
        r"([⁺⁻]?[⁰¹²³⁴-⁹]+|[₊₋]?[₀-₉]+)",
        r"((?:\d{1,4}[- ])?\d{1,4}[/⁄]\d{1,4})",
        r"([0-9]{1,2}[-/][0-9]{1,2}[-/][0-9]{2,4})",
        rf"((?:\([0-9]{{2,3}}\) ?|\+{{0,2}}(?:{_AREA}){{1,2}})[0-9]{{3,4}}[- ]?[0-9]{{3,5}})",
        # Addresses and tags of the net
        rf"((?i:https?)://{_URL}+{_URL_END})",
        rf"((?i:www)(?:\.[^\s\"<>|(){{}}.!?,/]+)+\.[A-Za-z]{{2,4}}(?:/{_URL}+{_URL_END})?)",
        rf"((?:{_HOST}\.)+(?:com|edu|net|org)(?:/{_URL}+{_URL_END})?)",
        r"(?P<address><?[A-Za-z0-9][^\s\"<>|(){}]*@(?:[^\s\"<>|(){}.]+\.)*[^\s\"<>|(){}.]+>?)",
        rf"(@[A-Za-z_][A-Za-z0-9_]*|#{_L}+)",
        # Faces and other signs
        r"([<>]?[:;=][-o*']?[()DPdpO\\{@|\[\]])[^A-Za-z0-9]",
        rf"({_FACE}_{_FACE}|\({_FACE}[_.]?{_FACE}\))",
        r"([A-Z]*\$)",
        r"([cC]\+\+|[cCfF]#|<<|>>|\\\*)",
        "(&#[0-9]+;|&(?i:amp|lt|gt);)",
        "(?P<dropped>&(?i:quot|nbsp|apos|mdash|ndash|md);)",
        r"(\*+|#+|@+|_+|[!?]{2,}|-{5,}|-(?i:[LR][RSC]B)-)",
        r"(?P<dropped>-{1,4}|\.{3,5}|\. \. \.|'')",
        r"(?P<quotes>[`‘’‚‛“”„‟‹›«»]{1,2})",
        rf"([{_SYMBOLS}])",
        "(?P<dropped>.)",
    )
]
_PLAIN_WORD = re.compile(r"(?!(?i:cannot|gonna|wanna|gotta|lemme|gimme)\b)[A-Za-z]+(?=,? )")

_ASCII_QUOTES = str.maketrans(
    {"‘": "`", "‛": "`", "‹": "`", "’": "'", "›": "'", "“": "``", "«": "``", "”": "''", "»": "''"}
)
_DROPPED_QUOTES = ("`", "'", "``", "''")
_REWRITTEN = {
    "(": "-lrb-",
    ")": "-rrb-",
    "[": "-lsb-",
    "]": "-rsb-",
    "{": "-lcb-",
    "}": "-rcb-",
    "£": "#",
    "€": "$",
    "¤": "$",
    "₠": "$",
    "¢": "cents",
    "¼": "1/4",
    "½": "1/2",
    "¾": "3/4",
    "⅓": "1/3",
    "⅔": "2/3",
    "&lt;": "<",
    "&gt;": ">",
}


def tokenize(text: str) -> list[str]:
    """Return the lower-case tokens of one sentence, without punctuation.

    A token may contain no-break spaces (`3 1/2`, telephone numbers), as the original's may.
    """
    text = " ".join(text.replace("\u00ad", "").split()) + "\n"
    tokens = []
    position = 0
    while position < len(text) - 1:
        if text[position] == " ":
            position += 1
        elif plain := _PLAIN_WORD.match(text, position):
            tokens.append(plain[0].lower())
            position = plain.end()
        else:
            match = _longest_match(text, position)
            if match.lastgroup != "dropped" and (token := _written(match)) not in _DROPPED_QUOTES:
                tokens.append(token)
            position = match.end(1)
    return tokens


def _longest_match(text: str, position: int) -> re.Match[str]:
    matches = (pattern.match(text, position) for pattern in _PATTERNS)
    return max((match for match in matches if match), key=re.Match.end)


def _written(match: re.Match[str]) -> str:
    """Return a token as the original prints it."""
    token = match[1].lower()
    if match.lastgroup in ("clitic", "quotes"):
        return token.replace("&apos;", "'").translate(_ASCII_QUOTES)
    if token in _REWRITTEN:
        return _REWRITTEN[token]
    if "://" not in token and token[0] != "<" and match.lastgroup != "address":
        token = token.replace("&amp;", "&").replace("(", "-lrb-").replace(")", "-rrb-")
    return token.replace(" ", "\u00a0")
