"""Statements: the lines and sentences of an answer as stemmed tokens that know where they stand in its text.

In: text as a model wrote it, with or without sections, or its JSON twin. Out: `Sentence`s with section,
tokens (character offsets into the text) and whether a heading above ("Do NOT:") forbids them. Stems are
Snowball's (snowballstemmer, BSD: one pure Python algorithm, no download), after British and American
spellings are folded. Limits: English; a sentence ends at . ! ? ; or the end of its line.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Iterator, Sequence

import snowballstemmer

_TOKEN = re.compile(r"\d+(?:[.,]\d+)*|[^\W\d_]+(?:['’][^\W\d_]+)*|[.!?]+|[,;:()\[\]]|[–—]| -+ |°|%|/|…|\n", re.UNICODE)
_SECTION = re.compile(r"^[ \t]*(?:#{1,6}[ \t]*)?(?:\*\*|__)?(FACTS|UNCERTAINTIES|ANALYSIS|GUIDANCE)(?:\*\*|__)?[ \t]*:?(?:\*\*|__)?[ \t]*$")
_MARK = re.compile(r"^[ \t]*(?:[•*\-–+◦▪]|\(?\d{1,3}[.)]|\(?[a-z][.)]|step \d{1,2}[.:)])[ \t]+|^[ \t]*#{1,6}[ \t]*", re.IGNORECASE)
_ENDS = frozenset(".!?…;")
_ABBREVIATION = frozenset("e.g i.e mr mrs dr st etc vs approx min max no".split())
_FORBIDDING = re.compile(
    r"\b(?:do not|don[’']?t|dont|never|avoid|not to do|must not|should not|shouldn[’']?t|don[’']?ts|mistakes|myths?|things not to|no[- ]?nos)\b", re.IGNORECASE)
_ALLOWING = re.compile(r"\b(?:instead|do this|what to do|never forget|do not forget|don[’']t forget|remember)\b", re.IGNORECASE)
_JSON_STRING = re.compile(r'"((?:[^"\\]|\\.)*)"(\s*:)?', re.DOTALL)
_ESCAPE = re.compile(r"\\(?:u[0-9a-fA-F]{4}|.)|[^\\]", re.DOTALL)
_SECTIONS = ("facts", "uncertainties", "analysis", "guidance")

_FOLD_END = ((re.compile(r"is(e|es|ed|ing|er|ers|ation|ations)$"), r"iz\1"), (re.compile(r"ys(e|ed|es|ing)$"), r"yz\1"))
_FOLD_STAY = frozenset("""raise raised raises raising rise rises rising advise advised advises advising wise noise exercise exercises exercised exercising
    otherwise likewise surprise promise promises promised promising bruise bruised bruises poise poised poison precise premise disguise supervise supervised
    supervising cruise praise arise arises devise revise noises this his is ise vise compromise clockwise improvise improvised improvising device paralysed
    surprised televised raiser misers miser riser appraise franchise disguised anticlockwise merchandise dise tise turquoise tortoise porpoise
    ised ising isation guise cruising bruising praising noised rised""".split())
_FOLD = {
    "colour": "color", "colours": "colors", "neighbour": "neighbor", "neighbours": "neighbors", "neighbouring": "neighboring", "vapour": "vapor", "vapours": "vapors",
    "odour": "odor", "odours": "odors", "harbour": "harbor", "labour": "labor", "centre": "center", "centres": "centers", "metre": "meter", "metres": "meters",
    "centimetre": "centimeter", "centimetres": "centimeters", "kilometre": "kilometer", "kilometres": "kilometers", "litre": "liter", "litres": "liters",
    "fibre": "fiber", "jewellery": "jewelry", "jewelery": "jewelry", "tyre": "tire", "tyres": "tires", "grey": "gray", "mould": "mold", "plaster": "plaster", "diarrhoea": "diarrhea",
    "oesophagus": "esophagus", "anaesthetic": "anesthetic", "paediatric": "pediatric", "haemorrhage": "hemorrhage", "haemorrhaging": "hemorrhaging", "foetus": "fetus",
    "manoeuvre": "maneuver", "manoeuvres": "maneuvers", "oestrogen": "estrogen", "towards": "toward", "afterwards": "afterward", "upwards": "upward", "inwards": "inward",
    "outwards": "outward", "downwards": "downward", "backwards": "backward", "forwards": "forward", "sideways": "sideways", "licence": "license", "kerb": "curb",
    "storey": "story", "storeys": "stories", "whisky": "whiskey", "sulphur": "sulfur", "aluminium": "aluminum", "plough": "plow", "travelling": "traveling",
    "signalling": "signaling", "signalled": "signaled", "labelled": "labeled", "fuelling": "fueling", "refuelling": "refueling", "refuelled": "refueled", "refuel": "refuel",
    "mum": "mom", "programme": "program", "cheque": "check", "defence": "defense", "draught": "draft", "draughts": "drafts", "oedema": "edema", "faeces": "feces",
    # Irregular forms, which no suffix rule reaches.
    "gave": "give", "given": "give", "took": "take", "taken": "take", "went": "go", "gone": "go", "ran": "run", "lying": "lie", "laid": "lay", "lain": "lie", "kept": "keep",
    "held": "hold", "threw": "throw", "thrown": "throw", "drove": "drive", "driven": "drive", "drank": "drink", "drunk": "drink", "ate": "eat", "eaten": "eat", "sat": "sit",
    "stood": "stand", "left": "left", "shook": "shake", "shaken": "shake", "hid": "hide", "hidden": "hide", "froze": "freeze", "frozen": "frozen", "swam": "swim", "swum": "swim",
    "stuck": "stick", "bitten": "bite", "bit": "bit", "broke": "break", "broken": "broken", "wore": "wear", "worn": "wear", "woke": "wake", "woken": "wake", "slept": "sleep",
    "told": "tell", "brought": "bring", "caught": "catch", "fought": "fight", "blew": "blow", "blown": "blow", "drew": "draw", "drawn": "draw", "swept": "sweep", "led": "lead",
    "lit": "light", "children": "child", "men": "man", "women": "woman", "feet": "foot", "teeth": "tooth", "knives": "knife", "people": "people",
    "sucked": "suck", "dying": "die", "tying": "tie", "untying": "untie", "wrung": "wring", "fed": "feed", "swung": "swing", "hung": "hang", "shut": "shut", "rode": "ride",
    "sought": "seek", "made": "make", "done": "do", "did": "do", "does": "do", "began": "begin", "begun": "begin", "beginning": "begin", "dialled": "dial", "dialling": "dial",
}
_NUMBER_WORDS = {"one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10", "twelve": "12",
                 "fifteen": "15", "twenty": "20", "thirty": "30", "forty": "40", "sixty": "60", "ninety": "90", "hundred": "100"}
_ENGLISH = snowballstemmer.stemmer("english")


@functools.lru_cache(maxsize=20_000)
def stem(word: str) -> str:
    """The stem of one lower-case word, the same for its inflections and its British and American spellings."""
    word = word.replace("’", "'")
    word = word.removesuffix("'s").removesuffix("'")
    word = _FOLD.get(word, word)
    if len(word) > 5 and word not in _FOLD_STAY:
        for pattern, replacement in _FOLD_END:
            word = pattern.sub(replacement, word)
    if word in _NUMBER_WORDS:
        return _NUMBER_WORDS[word]
    return _ENGLISH.stemWord(word)


@dataclass(frozen=True)
class Token:
    """One word, number or mark. stem: of the lower-cased word; start, end: offsets into the text."""

    low: str
    stem: str
    start: int
    end: int
    word: bool


@dataclass(frozen=True)
class Sentence:
    """Tokens of one sentence. forbidden: it stands under a heading that forbids; line: the number of its line."""

    tokens: tuple[Token, ...]
    section: str
    forbidden: bool
    line: int
    ends_with: str

    @property
    def start(self) -> int:
        return self.tokens[0].start

    @property
    def end(self) -> int:
        return self.tokens[-1].end


def read_sentences(text: str) -> list[Sentence]:
    """Every sentence of an answer, in reading order; section is "" for text outside the four sections."""
    lines = _json_lines(text) if text.lstrip().startswith("{") else _text_lines(text)
    sentences: list[Sentence] = []
    for number, (section, forbidden, tokens) in enumerate(lines):
        sentences += _split(tokens, section, forbidden, number)
    return sentences


def _tokens(text: str, places: Sequence[int] | int) -> list[Token]:
    found = []
    for match in _TOKEN.finditer(text):
        low = match.group().lower().strip(" ").replace("’", "'")
        word = low[0].isalnum()
        start, end = match.span()
        if isinstance(places, int):
            start, end = start + places, end + places
        else:
            start, end = places[start], places[end - 1] + 1
        found.append(Token(low, stem(low) if word else low, start, end, word))
    return found


def _split(tokens: Sequence[Token], section: str, forbidden: bool, line: int) -> Iterator[Sentence]:
    begin = 0
    for place, token in enumerate(tokens):
        if token.low[0] in _ENDS and not (token.low == "." and place and tokens[place - 1].low in _ABBREVIATION):
            if any(part.word for part in tokens[begin:place]):
                yield Sentence(tuple(tokens[begin:place]), section, forbidden, line, token.low[-1])
            begin = place + 1
    if any(part.word for part in tokens[begin:]):
        yield Sentence(tuple(tokens[begin:]), section, forbidden, line, "")


def _text_lines(text: str) -> Iterator[tuple[str, bool, list[Token]]]:
    """`(section, forbidden, tokens)` of every line. A heading that forbids holds for the bullets below it."""
    section, forbids, depth, start = "", False, -1, 0
    previous_blank = False
    for raw in text.splitlines(keepends=True):
        line = raw.rstrip("\n\r")
        begin, start = start, start + len(raw)
        if not line.strip():
            previous_blank = True
            continue
        if heading := _SECTION.match(line):
            section, forbids = heading.group(1).lower(), False
            continue
        mark = _MARK.match(line)
        body = line[mark.end():] if mark else line
        indent = len(line) - len(line.lstrip())
        bare = body.replace("*", "").replace("_", "").strip()
        is_heading = bare.endswith(":") or line.lstrip().startswith("#") or (body.strip().startswith("**") and body.strip().endswith("**"))
        if is_heading and len(bare.split()) <= 9:
            forbids, depth = bool(_FORBIDDING.search(bare)) and not _ALLOWING.search(bare), indent if mark and not line.lstrip().startswith("#") else -1
        elif forbids and ((not mark and previous_blank) or (mark and depth >= 0 and indent <= depth)):
            forbids = False
        previous_blank = False
        offset = begin + (mark.end() if mark else 0)
        tokens = [token for token in _tokens(body, offset)]
        if tokens:
            yield section, forbids and not is_heading, tokens


def _json_lines(text: str) -> Iterator[tuple[str, bool, list[Token]]]:
    section = ""
    for match in _JSON_STRING.finditer(text):
        if match.group(2):
            section = match.group(1).lower() if match.group(1).lower() in _SECTIONS else section
            continue
        plain, places, at = [], [], match.start(1)
        for piece in _ESCAPE.finditer(match.group(1)):
            raw = piece.group()
            letter = chr(int(raw[2:], 16)) if raw.startswith("\\u") and len(raw) == 6 else {"n": " ", "t": " "}.get(raw[1:], raw[-1]) if raw.startswith("\\") else raw
            plain.append(letter)
            places.append(at + piece.start())
        if tokens := _tokens("".join(plain), places):
            yield section, False, tokens
