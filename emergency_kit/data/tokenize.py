"""Tokens: records become rows of ids in which only the answer and its end token are supervised.

In: records, the tokenizer with its chat template. Out: `TokenRows`. A row is prompt ids, answer ids,
end-of-turn id; the label of the first part is IGNORE. Labels come from these segments, never from a
search in the text. The cache file is named by a hash of all that shapes it, so it cannot be stale.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Sequence

import numpy as np

from emergency_kit.artifacts import hash_json, staged_file
from emergency_kit.config import Resolved
from emergency_kit.data.format import Record, record_messages, render_prompt
from emergency_kit.errors import DataError
from emergency_kit.knowledge.cards import load_cards

IGNORE = -100
TOKENS_VERSION = 1


@dataclass(frozen=True)
class TokenRows(Sequence[dict[str, list[int]]]):
    """Rows of one split, flat. ids: int32 (total,), starts: int64 (rows + 1,), prompts: int64 (rows,) lengths in tokens."""

    ids: np.ndarray
    starts: np.ndarray
    prompts: np.ndarray
    names: tuple[str, ...]
    digest: str

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> dict[str, list[int]]:  # type: ignore[override]
        if not 0 <= index < len(self):
            raise IndexError(index)
        ids = self.ids[self.starts[index]:self.starts[index + 1]].tolist()
        prompt = int(self.prompts[index])
        return {"input_ids": ids, "labels": [IGNORE] * prompt + ids[prompt:]}

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, shape (rows,)."""
        return np.diff(self.starts)

    @property
    def supervised(self) -> int:
        """Supervised tokens of all rows."""
        return int(len(self.ids) - self.prompts.sum())


def encode_prompt(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    """Prompt ids with exactly one BOS where the tokenizer puts one."""
    ids = tokenizer(render_prompt(tokenizer, messages), add_special_tokens=False).input_ids
    opening = tokenizer("").input_ids
    if opening and opening[0] == tokenizer.bos_token_id and ids[:1] != opening[:1]:
        ids = opening[:1] + ids
    return ids


def encode_record(tokenizer: Any, record: Record, messages: list[dict[str, str]], max_seq_length: int,
                  overlength: str) -> tuple[list[int], int] | None:
    """`(ids, prompt length)` of a record; None when it is dropped for its length.

    Raises DataError for a record over `max_seq_length` under `error`, or whose answer alone is over it.
    """
    prompt = encode_prompt(tokenizer, messages)
    answer = tokenizer(record.output.strip(), add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
    total = len(prompt) + len(answer)
    if total <= max_seq_length:
        return prompt + answer, len(prompt)
    if overlength == "drop":
        return None
    if overlength == "truncate_prompt" and len(answer) < max_seq_length:
        # The head holds the instructions and the tail the situation, so the middle goes.
        keep = max_seq_length - len(answer)
        prompt = prompt[:keep - keep // 2] + prompt[len(prompt) - keep // 2:]
        return prompt + answer, len(prompt)
    raise DataError(f"record {record.id}: {total} tokens ({len(answer)} of them answer), model.max_seq_length is {max_seq_length}; "
                    "raise it, or set dataset.overlength to drop or truncate_prompt (an answer is never cut)")


def build_rows(records: list[Record], tokenizer: Any, resolved: Resolved, digest: str = "") -> TokenRows:
    """Tokenise records; what was dropped or truncated is counted, printed, and fatal under `dataset.strict`."""
    dataset, limit = resolved.config.dataset, resolved.config.model.max_seq_length
    cards = load_cards()
    ids: list[int] = []
    starts, prompts, names = [0], [], []
    dropped: list[str] = []
    truncated: list[str] = []
    for record in records:
        messages = record_messages(record, cards, dataset.grounding)
        encoded = encode_record(tokenizer, record, messages, limit, dataset.overlength)
        if encoded is None:
            dropped.append(record.id)
            continue
        row, prompt = encoded
        if len(row) == limit and dataset.overlength == "truncate_prompt" and len(encode_prompt(tokenizer, messages)) > prompt:
            truncated.append(record.id)
        _check_row(record.id, row, prompt, tokenizer)
        ids += row
        starts.append(len(ids))
        prompts.append(prompt)
        names.append(record.id)
    for kind, affected in (("dropped", dropped), ("truncated in the prompt", truncated)):
        if affected:
            message = f"{len(affected)} of {len(records)} records over {limit} tokens {kind}, first {affected[0]}"
            if dataset.strict:
                raise DataError(f"{message}; dataset.strict makes it fatal")
            print(message, flush=True)
    if not prompts:
        raise DataError(f"no record is within model.max_seq_length {limit}; raise it")
    return TokenRows(np.asarray(ids, np.int32), np.asarray(starts, np.int64), np.asarray(prompts, np.int64), tuple(names), digest)


def _check_row(name: str, row: list[int], prompt: int, tokenizer: Any) -> None:
    if prompt >= len(row) - 1:
        raise DataError(f"record {name}: no supervised token; its answer has no text")
    if row[-1] != tokenizer.eos_token_id:
        raise DataError(f"record {name}: its last label is not the end token {tokenizer.eos_token!r}")
    if tokenizer.bos_token_id is not None and row[:2] == [tokenizer.bos_token_id] * 2:
        raise DataError(f"record {name}: begins with two {tokenizer.bos_token!r}; check the chat template")


def cache_key(records: list[Record], tokenizer: Any, resolved: Resolved) -> str:
    """Hash of prompts as they are asked, answers, template, tokenizer, length, overlength rule and code version."""
    backend = tokenizer.backend_tokenizer.to_str() if hasattr(tokenizer, "backend_tokenizer") else str(sorted(tokenizer.get_vocab().items()))
    dataset, cards = resolved.config.dataset, load_cards()
    # The messages themselves: a change of cards, grounding or of how `data/format.py` renders them is a change here.
    asked = [(record.id, record_messages(record, cards, dataset.grounding), record.output) for record in records]
    return hash_json([TOKENS_VERSION, asked, dataset.overlength, resolved.config.model.max_seq_length, tokenizer.chat_template, backend,
                      [tokenizer.bos_token, tokenizer.eos_token],
                      render_prompt(tokenizer, [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}])])


def load_rows(records: list[Record], tokenizer: Any, resolved: Resolved) -> TokenRows:
    """Rows from the cache under `<output_dir>/cache/`, or tokenised now and cached."""
    from safetensors import SafetensorError, safe_open
    from safetensors.numpy import save_file

    key = cache_key(records, tokenizer, resolved)
    path = Path(resolved.config.training.output_dir) / "cache" / f"tokens-{key[:24]}.safetensors"
    if path.is_file() and not resolved.config.dataset.strict:
        try:
            with safe_open(path, "numpy") as stored:
                names = tuple(json.loads((stored.metadata() or {})["names"]))
                return TokenRows(*(stored.get_tensor(name) for name in ("ids", "starts", "prompts")), names, key)
        except (SafetensorError, KeyError, ValueError, OSError):
            print(f"{path}: not readable, tokenised anew", flush=True)
    rows = build_rows(records, tokenizer, resolved, key)
    with staged_file(path) as temporary:
        save_file({"ids": rows.ids, "starts": rows.starts, "prompts": rows.prompts}, temporary, {"names": json.dumps(rows.names)})
    return rows


def preview(resolved: Resolved, split: str, number: int) -> None:
    """Print rows as the model reads them; what is supervised stands between «»."""
    from emergency_kit.data.load import load_split
    from emergency_kit.model.backend import load_tokenizer

    tokenizer = load_tokenizer(resolved.config.model)
    for record in load_split(resolved, split)[:number]:
        rows = build_rows([record], tokenizer, resolved)
        ids, prompt = rows.ids.tolist(), int(rows.prompts[0])
        print(f"--- {record.id}: {len(ids)} tokens, {len(ids) - prompt} supervised")
        print(f"{tokenizer.decode(ids[:prompt])}«{tokenizer.decode(ids[prompt:])}»")
