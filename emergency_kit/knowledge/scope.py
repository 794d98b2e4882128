"""Scope: what the author of a sentence says of each of its words: do it, do not do it, if so, somebody else does it.

In: a `Sentence` and the one after it. Out: one flag set a token. The reading runs from left to right: a cue
("never", "rather than", "it is a myth that") opens a scope, and commas, "but", "instead" and the like close
it. What undoes a cue is read too ("do not hesitate to", "it is not dangerous to", "never stop"). Limits:
rules of thumb about English, no parse; what they get wrong is measured (docs/Evaluation.md).
"""

from __future__ import annotations

from typing import Iterable, Sequence

from emergency_kit.knowledge.lexicon import lexicon
from emergency_kit.knowledge.statements import Sentence, Token, stem

NEG, SOFT, COND, AFTER, TOLD, LIMITED, BEFORE, AWAY = 1, 2, 4, 8, 16, 32, 64, 128
"""Forbidden outright; discouraged or put behind something else; only if; once that is done; somebody else's act or
words, or an explanation; forbidden only until, unless, from or near something; what comes later ("before you touch"); what to
keep away from."""

_NOT = frozenset("not never no nor neither cannot dont cant wont shouldnt mustnt nobody none nothing".split())
_UNDONE = frozenset(stem(word) for word in "hesitate forget fail neglect afraid shy scared delay postpone worry reluctant omit stop skip cease quit avoid refuse ignore".split())
_ASPECT = frozenset(stem(word) for word in "stop avoid skip delay postpone cease quit refuse resist refrain forbid ban prohibit prevent ignore discourage beware".split())
_CALM = frozenset(stem(word) for word in "panic worry hesitate wait delay alarm fret waste".split())
_JOINS_CALL = frozenset(stem(word) for word in "call dial phone ring get seek stay keep evacuate leave follow cover tell make alert contact instead".split())
_BOUNDARY = frozenset("but however although though otherwise yet whereas".split())
_IF = frozenset("if when whenever until till whether in_case should while provided".split())
_ONCE = frozenset("once after".split())
_SUBJECT_NOT_YOU = frozenset("he she they i we people someone somebody who some many others everybody everyone bystanders".split())
_MODAL = frozenset("may will can should might must would could shall are is have has usually".split())
_LETS = frozenset("let leave allow have for only wait until".split())
_MAY = frozenset("can should must may could".split())
_HARMLESS = frozenset("to in if with about at either him her them anyone anybody you here".split())
_BRINGS = frozenset("raises gets keeps gives lets takes buys does frees".split())
_BETTER = frozenset("better safer quicker faster easier wiser".split())
_HARMS = frozenset("monoxide fumes scratch scratches".split())
_STOPPED = frozenset("heart breathing rest vomit ceiling building".split())
_PRESENT = frozenset("do does did".split())


def _bad(token: Token) -> bool:
    return token.stem in lexicon().bad


def scopes(sentence: Sentence, following: Sentence | None = None) -> list[int]:
    """One set of flags a token; punctuation carries those of its place."""
    tokens = sentence.tokens
    flags = [0] * len(tokens)
    state = NEG if sentence.forbidden else 0
    base = state
    hold_until = -1
    verb_seen = False
    place = 0
    while place < len(tokens):
        token = tokens[place]
        low = token.low
        if not token.word:
            if place >= hold_until:
                state = _after_mark(tokens, place, state, base, verb_seen)
            flags[place] = state
            place += 1
            continue
        width, change = _cue(tokens, place, state)
        if change is not None:
            new, verb_seen = change, False
            # "do not, under any circumstances, use water": the scope outlives the commas of the insertion.
            if new & (NEG | SOFT) and place + width < len(tokens) and tokens[place + width].low == ",":
                hold_until = next((later + 1 for later in range(place + width + 1, len(tokens)) if tokens[later].low == ","), -1)
            banned = low in _NOT or low.endswith("n't")
            for step in range(width):
                # "Butter won't hurt": what is denied is harm, so that nothing is forbidden.
                flags[place + step] = NEG if banned and step and not _bad(tokens[place + step]) else state
            # "Do NOT: stop the insulin" wants the insulin: a flip inside a forbidden line ends the ban of its heading.
            state = new | (0 if state & NEG and not new else base)
            place += width
            continue
        flags[place] = state
        if state & (NEG | SOFT) and low not in ("to", "be", "ever", "try", "under", "any", "circumstances"):
            verb_seen = True
        place += 1
    _mark_limits(tokens, flags)
    _mark_away(tokens, flags)
    _mark_left(tokens, flags)
    _mark_question(sentence, following, flags)
    return flags


def _after_mark(tokens: Sequence[Token], place: int, state: int, base: int, verb_seen: bool) -> int:
    low = tokens[place].low
    if low in ("(", ")", "[", "]", "/", "°", "%"):
        return state
    if low == ":":
        # "Never: pour water" keeps its scope, "If trapped: do this" ends it.
        return base | (state & (NEG | SOFT) if not verb_seen else 0)
    if low in ("–", "—", "-"):
        return base
    if state & (COND | AFTER | BEFORE):
        return base
    if state & (NEG | SOFT):
        if not verb_seen or _list_goes_on(tokens, place):
            return state
        return base
    return base | (state & TOLD if low != "," or _list_goes_on(tokens, place) else 0)


def _list_goes_on(tokens: Sequence[Token], comma: int) -> bool:
    """Whether what follows a comma is still forbidden: an enumeration that "or" closes, or something that is no order."""
    after = [token for token in tokens[comma + 1:comma + 2] if token.word]
    if not after:
        return False
    if after[0].low in ("or", "nor"):
        return True
    if after[0].low in _BOUNDARY or after[0].low in ("instead", "just", "and", "then", "so", "as", "because", "which", "this", "it", "that"):
        return False
    for token in tokens[comma + 1:comma + 16]:
        if token.low in _BOUNDARY or token.low in ("instead", "then", "so"):
            break
        if token.low in ("or", "nor"):
            return True
    return after[0].stem not in lexicon().verbs


def _cue(tokens: Sequence[Token], place: int, state: int) -> tuple[int, int | None]:
    """`(tokens consumed, new state)`; None where no cue stands."""
    low = tokens[place].low
    nexts = [token.low for token in tokens[place + 1:place + 6]]
    pair = (low, *nexts[:1])
    negated = low in _NOT or low.endswith("n't")
    before = tokens[place - 1].low if place else ""
    if pair in (("rather", "than"), ("instead", "of"), ("opposed", "to"), ("keep", "from"), ("steer", "clear"), ("far", "from")):
        return 2, SOFT
    if low == "without" or low == "against" and before and stem(before) in lexicon().advises:
        return 1, SOFT
    if negated:
        return _negation(tokens, place, nexts, state)
    # "A lid is better than flour", but "nothing is better than brandy".
    if low == "than" and before in _BETTER and not any(token.low == "nothing" for token in tokens[:place]):
        return 1, SOFT
    stems = [token.stem for token in tokens[place:place + 2]]
    if state & NEG and low == "and" and nexts:
        # "do not panic and call 911" calls; "do not touch it and do not move it" has a cue of its own.
        first = tokens[place + 1].stem
        cue = max((at for at in range(place) if tokens[at].low in _NOT or tokens[at].low.endswith("n't")), default=place)
        calm = any(token.stem in _CALM for token in tokens[cue + 1:cue + 3])
        if calm or first in _JOINS_CALL:
            return 1, 0
    if state & NEG and stems[0] in _UNDONE and nexts and (nexts[0].endswith("ing") or nexts[0] == "to") and before not in ("be",):
        return 1, 0
    if stems[0] in _ASPECT and not state & NEG and nexts and low != "stopping":
        if stems[0] not in (stem("stop"), stem("prevent"), stem("ignore")) or nexts[0].endswith("ing") or "from" in nexts[:3] or (stems[0] == stem("ignore") and "advice" in nexts[:3]):
            return 1, SOFT
    if _bad(tokens[place]) and not state & NEG and any(word in ("to", "of", "that", "in") for word in nexts[:2]):
        # "it is dangerous to pour", "the risk of pouring", "a myth that you should pour".
        if not low.endswith("ed") and nexts[0] in ("to", "of", "that", "in"):
            return 2, SOFT
    if low in ("myth", "wrong", "mistake", "false") and nexts[:1] == [":"]:
        return 1, SOFT
    if low in _BOUNDARY or (low == "instead" and (place == 0 or before in (",", "and", "but", ";"))):
        return 1, 0
    if low == "then" and place:
        return 1, 0
    if low in ("because", "since") and place or low in ("which", "why"):
        return 1, TOLD
    if low == "so" and before == ",":
        return 1, 0
    if pair == ("in", "case") or pair == ("as", "if"):
        return 2, (state & (NEG | SOFT)) | COND
    if pair == ("only", "if") or pair == ("even", "if"):
        return 2, state | COND
    if low == "if" and place and tokens[place - 1].stem in lexicon().better:
        return 1, state & (NEG | SOFT)
    if low in _IF and not (low == "should" and place):
        return 1, (state & (NEG | SOFT)) | COND
    if low == "unless":
        return 1, SOFT
    if low == "before":
        return 1, (state & (NEG | SOFT)) | BEFORE
    if low in _ONCE:
        return 1, (state & (NEG | SOFT)) | AFTER
    if told := _told(tokens, place):
        return told, (state & (NEG | SOFT)) | TOLD
    return 1, None


def _negation(tokens: Sequence[Token], place: int, nexts: list[str], state: int) -> tuple[int, int | None]:
    low = tokens[place].low
    if nexts[:1] and nexts[0] in ("only", "just", "merely") or low == "nothing" and nexts[:1] == ["but"]:
        return 2, state & ~(NEG | SOFT)
    if low == "no" and nexts[:2] == ["matter", "what"] or low == "no" and nexts[:1] in (["longer"], ["later"], ["sooner"], ["more"], ["less"]):
        return 2, state
    if low == "no" and not nexts:
        return 1, None
    if place and tokens[place - 1].low == "why":
        return 1, state
    for step, word in enumerate(tokens[place + 1:place + 5], 1):
        if not word.word:
            break
        after = tokens[place + step + 1].low if place + step + 1 < len(tokens) else ""
        if word.stem == "hold" and after in ("back", "off"):
            return step + 2, 0
        if word.stem in _UNDONE and (after in ("to", "about", "in") or after.endswith("ing")):
            return step + 1, 0
        # "do not wait to call", "without waiting": the waiting is refused, the call is wanted.
        if word.stem in (stem("wait"), stem("wast")) and after == "to" and tokens[place + step + 2:place + step + 3] and tokens[place + step + 2].low not in ("see", "find"):
            return step + 2, 0
        if _bad(word) and step <= 3 and (after in _HARMLESS or not after) and (low != "never" or not after):
            return step + 1, 0
    # "There is no reason not to", "nothing to stop you from": two bans lift each other.
    if low in ("no", "nothing", "not") and (nexts[:2] == ["reason", "not"] or nexts[:3] == ["to", "stop", "you"] or nexts[:2] == ["stops", "you"]):
        return 3, 0
    return 1, NEG | (state & (COND | AFTER | BEFORE))


def _told(tokens: Sequence[Token], place: int) -> int:
    """Tokens that open somebody else's act or words: "the neighbour says", "paramedics may", "let the crew"; 0 for none."""
    words = lexicon()
    token = tokens[place]
    before = [part for part in tokens[max(0, place - 6):place] if part.word]
    opens = not before or (place and not tokens[place - 1].word)
    if token.stem in words.professionals:
        later = tokens[place + 1].low if place + 1 < len(tokens) else ""
        lets = any(part.low in _LETS for part in before[-4:])
        named = all(part.low in ("the", "a", "only", "trained", "qualified", "medical", "emergency", "and", "or", "other", "let", "leave", "allow", "have", "your", "wait", "for", "it", "to", "health", "care", "fire", "rescue", "until", "services", "any")
                    or part.stem in words.professionals for part in before)
        if (named or lets) and later in _MODAL | {"to"} or (lets and later and later not in (",", ".", "and", "or", "on") and stem(later) in words.verbs):
            return 1
        return 0
    if token.stem in words.says and before and not opens:
        subject = [part.low for part in before]
        if token.low.endswith(("ing",)) and subject[-1] not in ("is", "are", "was", "were", "keeps", "keep"):
            return 0
        if subject[-1] in ("you", "to", "please", "then", "and", "or", "not", "but", "just", "first", "instead", "so", "a", "the", "as", "also", "always") or any(word in ("you", "card") for word in subject[-2:]):
            return 0
        return 1
    if token.low in _SUBJECT_NOT_YOU and opens and place + 1 < len(tokens) and tokens[place + 1].word and token.low not in ("everyone", "someone", "somebody", "everybody", "we"):
        # What the person in need may do is advice: "he can go home"; "they" may be the crew.
        return 0 if token.low in ("he", "she") and tokens[place + 1].low in _MAY or tokens[place + 1].low in ("needs", "ought") else 1
    return 0


def _mark_limits(tokens: Sequence[Token], flags: list[int]) -> None:
    """A ban with a condition in the same clause is no plain ban."""
    for place, token in enumerate(tokens):
        if token.low in ("until", "unless", "till", "if", "while", "when", "before", "from", "near", "inside", "indoors", "without", "over", "during", "yourself", "alone", "too", "first", "or", "than", "after"):
            step = place
            while step >= 0 and flags[step] & (NEG | SOFT):
                flags[step] |= LIMITED
                step -= 1
            step = place
            while step < len(tokens) and flags[step] & (NEG | SOFT):
                flags[step] |= LIMITED
                step += 1


def _mark_away(tokens: Sequence[Token], flags: list[int]) -> None:
    """What follows "stay away from", "keep clear of", "out of": nobody is sent there."""
    for place, token in enumerate(tokens):
        after = tokens[place + 1].low if place + 1 < len(tokens) else ""
        # "Move to the back, away from the doors": what is to be kept away from may be named later.
        before = [part.low for part in tokens[max(0, place - (8 if (token.low, after) == ("away", "from") else 4)):place]]
        if (token.low, after) in (("clear", "of"), ("far", "from")) or (token.low in ("off", "out", "away", "clear") and {"stay", "keep", "kept", "remain", "get", "move", "stand"} & set(before)
                                                                       and (after in ("from", "of") or {"stay", "keep", "kept", "remain"} & set(before))):
            for later in range(place + 1, len(tokens)):
                if tokens[later].low in _BOUNDARY or not tokens[later].word:
                    break
                flags[later] |= AWAY


def _mark_left(tokens: Sequence[Token], flags: list[int]) -> None:
    """What is left to those who are trained for it: "leave the search to the crew"."""
    if tokens[0].low == "leave":
        to = next((place for place, token in enumerate(tokens) if token.low == "to"), 0)
        if any(token.stem in lexicon().professionals for token in tokens[to:to + 5]):
            for place in range(1, to):
                flags[place] |= SOFT


def _mark_question(sentence: Sentence, following: Sentence | None, flags: list[int]) -> None:
    """A question advises nothing; its answer does: "Pour water? No."""
    if sentence.ends_with == "?":
        first = following.tokens[0].low if following and following.line - sentence.line <= 1 else ""
        if first in ("yes", "absolutely", "definitely", "sure", "yeah", "certainly"):
            return
        refused = first in ("no", "never", "nope", "don't", "not", "wrong")
        for place in range(len(flags)):
            flags[place] |= SOFT if refused else TOLD
        return
    if following and following.line - sentence.line <= 1:
        opening = following.tokens[:9]
        lows = [token.low for token in opening]
        spoken = lows[0] in ("this", "that", "it", "doing", "these") or lows[0] == "no"
        nots = any(low in _NOT or low.endswith("n't") for low in lows[1:])
        bad = next((at for at, token in enumerate(opening) if _bad(token)), None)
        if lows[0] in ("wrong", "myth", "false") or (spoken and bad is not None and not nots and lows[bad + 1:bad + 2] not in (["to"], ["if"])) and lows[0] != "no":
            for place in range(len(flags)):
                flags[place] |= SOFT


def condemned(tokens: Sequence[Token], start: int, end: int, matched: frozenset[int], subject: bool = True) -> bool | None:
    """What a sentence says of what stands from `start` to `end`: True for harm, False for praise, None for nothing.

    matched: places of its own words. subject: it is what the sentence is about ("twisting the neck could ..."), so that a mere "may" is a danger.
    """
    words = lexicon()
    nots = may = False
    if end < len(tokens) and tokens[end].low == "only":
        return True  # "iodine protects only the thyroid"
    for place in range(start + 1, min(len(tokens), end + 10)):
        token = tokens[place]
        if token.low in _BOUNDARY or (place >= end and token.low in _IF) or (token.low in (",", "so", "then") and place > end + 3):
            break
        if token.low == "and" and nots and place > end:
            return True  # "do nothing in heat stroke and may harm"
        if place in matched:
            continue
        if token.low == "too" and not nots:
            return True
        may = may or token.low in ("can", "could", "may", "might", "will", "would")
        if token.low in _NOT or token.low.endswith("n't"):
            nots = True
        elif token.stem in words.bad or token.low in _HARMS:
            return not nots
        elif token.low in ("stop", "bring") and any(part.low in _STOPPED for part in tokens[place + 1:place + 4]):
            return not nots  # "a cold bath can stop the heart"
        elif token.stem in words.good:
            return nots
    if nots:
        return True
    # "Twisting the neck could paralyse him": what may follow, unless it is praised, is a danger.
    follows = [token.low for place, token in enumerate(tokens[:end + 3]) if place > start and place not in matched and len(token.low) > 3 and token.low.endswith("s")
               and (place == end or token.stem in words.verbs or token.stem in words.bad)]
    if subject and follows and follows[0] not in _BRINGS:
        return True  # "searching for the source costs lives"
    return True if may and subject else None


def refuses(token: Token) -> bool:
    """Whether a verb itself is a refusal: stop, skip, avoid, delay."""
    return token.stem in _ASPECT or token.low == "leave"


def flags_of(flags: Sequence[int], places: Iterable[int]) -> int:
    """All flags of some tokens together."""
    together = 0
    for place in places:
        together |= flags[place]
    return together
