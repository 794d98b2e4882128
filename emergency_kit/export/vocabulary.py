"""Vocabulary: a Hugging Face tokenizer as a GGUF file describes it.

In: a fast tokenizer as transformers loaded it, which may differ from its `tokenizer.json` (transformers
gives a Qwen2 model Qwen2's splitting, whatever the file says), so its working parts are read, not
the file. Out: tokens, kinds, merges or scores, special ids. Two kinds are known: byte-level BPE, whose text
splitting llama.cpp knows only by name (`pre`), and SentencePiece BPE (Llama 2, Mistral 7B).
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from emergency_kit.data.tokenize import end_of_turn
from emergency_kit.errors import ExportError

if TYPE_CHECKING:
    from gguf import GGUFWriter

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BYTES_AND_WORDS, _BYTES = ("ByteLevel", True), ("ByteLevel", False)
# llama.cpp's name of a way to split text: the steps in tokenizer.json, and whether whole words skip the merges.
PRE_TOKENIZERS: dict[str, tuple[list[tuple[Any, ...]], bool]] = {
    "gpt-2": ([_BYTES_AND_WORDS], False),
    "smollm": ([("Digits", True), _BYTES_AND_WORDS], False),
    "llama-bpe": ([("Split", rf"{_SHORT}|{_LETTERS}|\p{{N}}{{1,3}}|{_TAIL}"), _BYTES], True),
    "qwen2": ([("Split", rf"{_SHORT}|{_LETTERS}|\p{{N}}|{_TAIL}"), _BYTES], False),
    "tekken": ([("Split", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
                          r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"), _BYTES], True),
}


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says of a tokenizer.

    kind: `gpt2` (byte-level BPE, with merges and pre) or `llama` (SentencePiece, with scores); tokens, kinds
    and scores have one entry a row of the embedding. special: GGUF's name of a role to its id.
    """

    kind: str
    pre: str
    tokens: list[str]
    kinds: list[int]
    scores: list[float] = field(default_factory=list)
    merges: list[str] = field(default_factory=list)
    special: dict[str, int] = field(default_factory=dict)
    add_bos: bool = False
    add_eos: bool = False
    add_space_prefix: bool = False
    chat_template: str | None = None


def build_vocabulary(tokenizer: Any, rows: int, source: str) -> Vocabulary:
    """Read a tokenizer for a model whose embedding has `rows` rows.

    Raises ExportError when llama.cpp has no equal for it.
    """
    if not getattr(tokenizer, "backend_tokenizer", None):
        raise ExportError(f"model {source}: its tokenizer has no tokenizer.json, which the GGUF exporter reads; "
                          "convert the merged folder with llama.cpp's own convert_hf_to_gguf.py")
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    if parts["model"]["type"] != "BPE":
        raise ExportError(f"model {source}: a {parts['model']['type']} tokenizer is not one that the GGUF exporter knows (BPE only); "
                          "convert the merged folder with llama.cpp's own convert_hf_to_gguf.py")
    steps = _list_steps(parts["pre_tokenizer"], "pretokenizers")
    byte_level = any(step["type"] == "ByteLevel" for step in steps)
    tokens, kinds = _list_tokens(tokenizer, parts, rows, source, byte_level)
    ids = {role: getattr(tokenizer, f"{name}_token_id") for role, name in
           (("bos", "bos"), ("eos", "eos"), ("unk", "unk"), ("pad", "pad"))}
    end = end_of_turn(tokenizer) if tokenizer.chat_template else ids["eos"]
    encoded = tokenizer("a")["input_ids"]
    common: dict[str, Any] = {
        "tokens": tokens, "kinds": kinds, "special": {role: number for role, number in ids.items() if number is not None} | ({"eot": end} if end != ids["eos"] else {}),
        "add_bos": bool(encoded) and ids["bos"] is not None and encoded[0] == ids["bos"],
        "add_eos": len(encoded) > 1 and ids["eos"] is not None and encoded[-1] == ids["eos"],
        "chat_template": tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in parts["model"]["merges"]]
    if byte_level:
        return Vocabulary("gpt2", _pick_pre(parts, steps, source), merges=merges, **common)
    scores = _rank_tokens(tokens, merges)
    return Vocabulary("llama", "default", scores=scores, add_space_prefix=_adds_space(parts, steps, source), **common)


def add_vocabulary(writer: "GGUFWriter", vocabulary: Vocabulary) -> None:
    """Write a vocabulary into a GGUF file's metadata."""
    writer.add_tokenizer_model(vocabulary.kind)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.kinds)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    add_id = {"bos": writer.add_bos_token_id, "eos": writer.add_eos_token_id, "unk": writer.add_unk_token_id, "pad": writer.add_pad_token_id,
              "eot": writer.add_eot_token_id}
    for role, number in vocabulary.special.items():
        add_id[role](number)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    writer.add_add_space_prefix(vocabulary.add_space_prefix)
    if vocabulary.chat_template:
        writer.add_chat_template(vocabulary.chat_template)


def _list_steps(part: dict[str, Any] | None, plural: str) -> list[dict[str, Any]]:
    """The steps of a normaliser or pre-tokenizer, sequences unfolded."""
    if part is None:
        return []
    return [step for inner in part[plural] for step in _list_steps(inner, plural)] if part["type"] == "Sequence" else [part]


def _list_tokens(tokenizer: Any, parts: dict[str, Any], rows: int, source: str, byte_level: bool) -> tuple[list[str], list[int]]:
    """Tokens by id and their kinds, filled up with unused ones to the rows of the embedding."""
    by_id = {number: token for token, number in parts["model"]["vocab"].items()}
    added = tokenizer.added_tokens_decoder
    by_id.update({number: token.content for number, token in added.items()})
    if max(by_id) >= rows:
        raise ExportError(f"model {source}: its tokenizer has token {max(by_id)} ({by_id[max(by_id)]!r}), but its embedding only {rows} rows; "
                          "tokenizer and model do not belong together")
    unknown = parts["model"].get("unk_token")
    tokens, kinds = [], []
    for number in range(rows):
        token = by_id.get(number)
        tokens.append(f"[PAD{number}]" if token is None else token)
        if token is None:
            kinds.append(UNUSED)
        elif not byte_level and token == unknown:
            kinds.append(UNKNOWN)
        elif number in added:
            kinds.append(CONTROL if added[number].special else USER_DEFINED)
        else:
            kinds.append(BYTE if not byte_level and re.fullmatch(r"<0x[0-9A-F]{2}>", token) else NORMAL)
    return tokens, kinds


def _pick_pre(parts: dict[str, Any], steps: list[dict[str, Any]], source: str) -> str:
    """llama.cpp's name for the way in which a byte-level tokenizer splits text."""
    found: list[tuple[Any, ...]] = []
    for step in steps:
        if step["type"] == "ByteLevel" and not step["add_prefix_space"]:
            found.append(("ByteLevel", step["use_regex"]))
        elif step["type"] == "Digits":
            found.append(("Digits", step["individual_digits"]))
        elif step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            found.append(("Split", step["pattern"].get("Regex")))
        else:
            found.append((step["type"],))
    normalisers = {step["type"] for step in _list_steps(parts["normalizer"], "normalizers")}
    if normalisers <= {"NFC"}:
        for name, (known, whole_words) in PRE_TOKENIZERS.items():
            if found == known and bool(parts["model"].get("ignore_merges")) == whole_words:
                return name
    shown = " + ".join(str(step[-1] if step[0] == "Split" else step[0]) for step in found)
    raise ExportError(f"model {source}: its tokenizer splits text in a way that the GGUF exporter has no llama.cpp name for "
                      f"({shown[:160]}; known: {', '.join(PRE_TOKENIZERS)}). "
                      "Next: convert the merged folder with llama.cpp's own convert_hf_to_gguf.py")


def _rank_tokens(tokens: list[str], merges: list[str]) -> list[float]:
    """SentencePiece scores, higher merges first: minus the rank of the first merge that makes a token.

    transformers drops SentencePiece's own scores; tokens that no merge makes are only ever single
    characters or special, where the score does not matter.
    """
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault(merge.replace(" ", "", 1), rank)
    return [float(-ranks.get(token, len(merges))) for token in tokens]


def _adds_space(parts: dict[str, Any], steps: list[dict[str, Any]], source: str) -> bool:
    """Whether a SentencePiece tokenizer puts a space before text after each special token.

    Metaspace's `first` does so only at the very start of a text, where a chat template has the BOS token.
    """
    normalisers = _list_steps(parts["normalizer"], "normalizers")
    space = any(step["type"] == "Replace" and step.get("content") == "▁" for step in normalisers)
    meta = [step for step in steps if step["type"] == "Metaspace"]
    others = [step["type"] for step in normalisers if step["type"] not in ("Prepend", "Replace")]
    others += [step["type"] for step in steps if step["type"] != "Metaspace"]
    if others or not (space or meta) or not parts["model"].get("byte_fallback"):
        raise ExportError(f"model {source}: its tokenizer is neither byte-level BPE nor SentencePiece BPE with byte fallback"
                          f"{' (it has ' + ', '.join(others) + ')' if others else ''}; "
                          "convert the merged folder with llama.cpp's own convert_hf_to_gguf.py")
    return any(step["type"] == "Prepend" for step in normalisers) or any(step.get("prepend_scheme") == "always" for step in meta)
