"""Strings on which two tokenizers are compared: what breaks them in practice, and what the kit's users write.

In: a tokenizer and its chat template. Out: `count` different strings, the same every time: hand-picked ones (digits,
accents, scripts, emoji, white space, quotes, code), the tokenizer's own special tokens amid text, and
lines of the knowledge cards, plain and distorted.
"""

from __future__ import annotations

import itertools
import random
from typing import Any, Iterator

from emergency_kit.knowledge.cards import load_cards

DIGITS = ["112", "911", "000", "1-800-222-1222", "+44 20 7946 0958", "37.5 °C", "10 cm", "0.3mg", "2x15", "30:2", "5-6 cm", "½ cup", "3/4", "1,000 ml",
          "1234567890", "12345 678", "999999999999", "٣٧", "１１２", "v2.10.3", "0x1F", "1e-5", "100%", "a1b22c333", "08:05", "2026-11-25", "²³", "Ⅻ"]
SCRIPTS = ["é à ü ñ ç ø ß", "naïve café coöperate", "ﬁre ﬂood", "e\u0301 a\u0308", "¿Dónde está?", "Straße ÄÖÜ", "žluťoučký kůň", "İstanbul ı",
           "Ελληνικά", "Помогите, пожар!", "النجدة حريق", "הצילו", "मदद कीजिए", "ช่วยด้วย", "助けて！火事です", "地震了怎么办", "도와주세요", "Trợ giúp",
           "𝓱𝓮𝓵𝓹", "\u200bzero\u200dwidth", "a\u00a0b\u202fc", "\ufeffbom", "soft\u00adhyphen", "RTL \u202emark\u202c"]
EMOJI = ["🔥", "🚑🚒🚓", "🔥🚑 ok", "👨‍👩‍👧‍👦", "🏳️‍🌈", "👍🏽", "❤️", "☎️ 112", "🆘🆘🆘", "fire🔥fire", "🧯now", "⚠️ gas", "🩸", "1️⃣", "🇩🇪🇫🇷", "😱😱 he fell"]
SPACE = [" ", "  ", "   lead", "trail  ", "a  b   c    d", "\t", "a\tb\t\tc", "\n", "\n\n", "a\nb", "a\n\nb\n \n  c", "a\r\nb\r\n", " \n ", "\n  x\n", "a \n b",
         "tab\t end ", "x" * 40, "ab" * 40, " " * 17 + "x", "." * 20, "-" * 33, "a" + "\n" * 5 + "b"]
WORDS = ["“don’t” — it’s", "don't can't won't I'll we've he'd they're it's I'm", "DON'T IT'S I'M", "'quoted'", "call 911 now!!", "HELP", "hElP", "Wha?!", "...",
         "…", "a/b\\c", "e-mail: a.b@c.de", "https://x.org/a?b=1&c=2#d", "if (x) { y(); }", "<b>no</b>", "{{ user }} {% raw %}", "`code`", "**bold**", "• one\n• two",
         "1. a\n2. b", "FACTS\n• A man\n\nGUIDANCE\n1. Call.", "CARD: Burn\nNever: ice", "C++ & C#", "$5.00", "€10", "@#$%^&*()", "_under_score_", "camelCaseWord", "nulls\\0",
         "supercalifragilisticexpialidocious", "Arternithinneal", "mmHg", "CPR/AED", "SpO2", "H₂O", "N95", "x=y", "a.b.c", "¡!", "«a»", "‘a’", "—", "–5"]


def build_strings(tokenizer: Any, count: int) -> list[str]:
    """`count` different strings, none empty."""
    found = dict.fromkeys(itertools.islice(_unlimited(tokenizer), 4 * count))
    return list(found)[:count]


def _unlimited(tokenizer: Any) -> Iterator[str]:
    # First one of each kind, so that a short list has them all.
    groups = [DIGITS, EMOJI, list(_specials(tokenizer)), SCRIPTS, SPACE, WORDS]
    yield from (text for together in itertools.zip_longest(*groups) for text in together if text is not None)
    chance = random.Random(0)
    lines = [line for card in load_cards().values() for line in
             (card.name, *card.signs, *(action.text for action in card.critical_actions), *(rule.text for rule in card.never))]
    odd = [text for group in (DIGITS, SCRIPTS, EMOJI, SPACE, WORDS) for text in group]
    while True:
        line = chance.choice(lines)
        distort = chance.choice((str, str.upper, str.lower, str.title, lambda text: text.replace(" ", "  "), lambda text: text.replace(" ", "\n")))
        yield chance.choice(("{0}", "{1}{0}", "{0}{1}", "{0} {1}", "{1}\n{0}{2}")).format(distort(line), chance.choice(odd), chance.choice(odd))


def _specials(tokenizer: Any) -> Iterator[str]:
    tokens = [token.content for token in tokenizer.added_tokens_decoder.values()][:12]
    for token in tokens:
        yield from (token, f"a {token}b", f"{token}\nuser\n{token}")
    if len(tokens) > 1:
        yield f"{tokens[0]}{tokens[1]} x {tokens[1]}"
    for role in ("user", "assistant"):
        yield f"[INST] {role} [/INST]"
        yield f"<|im_start|>{role}\nhi<|im_end|>\n"
        yield f"<|start_header_id|>{role}<|end_header_id|>\n\nhi<|eot_id|>"
