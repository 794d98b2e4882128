"""Tokens: records become rows of ids in which only the answer and its end token are supervised.

In: records, the tokenizer with its chat template. Out: `TokenRows`, in memory or read from disk as they
are needed. A row is prompt ids, answer ids, end-of-turn id; the label of the first part is IGNORE. The ids are those of the
tokenizer's own chat template, and the prompt is the one that inference asks with; where a token would stand over the border of the two,
the answer is tokenised by itself. Labels come from these segments, never from a search in the text. A control token that stands in the
text of a record becomes that token, as in every chat template; `data inspect` names such rows.
"""

from __future__ import annotations

import json
import os
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Sequence

import numpy as np
import xxhash

from emergency_kit.config import Resolved
from emergency_kit.data.divide import divide
from emergency_kit.data.format import Record, record_messages
from emergency_kit.data.template import PromptRenderer, find_turn, render_prompt
from emergency_kit.errors import DataError
from emergency_kit.knowledge.cards import load_cards

IGNORE = -100
# Longer than any row, for those who measure lengths instead of enforcing them.
NO_LIMIT = 1 << 30
# Records tokenised in one call: enough to amortise it, few enough to stay in the cache.
BATCH = 256


@dataclass(frozen=True)
class TokenRows(Sequence[dict[str, list[int]]]):
    """Rows of one split, flat. ids: int32 (total,), starts: int64 (rows + 1,), prompts: int32 (rows,) lengths in tokens."""

    ids: np.ndarray
    starts: np.ndarray
    prompts: np.ndarray

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
        return int(len(self.ids) - self.prompts.sum(dtype=np.int64))

    def digest(self) -> str:
        """Hash of ids, bounds and masks: equal where the model would read and be scored on the same tokens in the same order."""
        digest = xxhash.xxh3_128()
        for values in (self.ids, self.starts, self.prompts):
            digest.update(np.ascontiguousarray(values))
        return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Encoded:
    """A record as tokens. ids: empty where it was dropped. tokens: its length before anything was dropped or cut."""

    record: Record
    ids: list[int]
    prompt: int
    tokens: int
    answer: int


def encode_prompt(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    """Prompt ids with exactly one BOS where the tokenizer puts one."""
    return _with_bos(tokenizer(render_prompt(tokenizer, messages), add_special_tokens=False).input_ids, _opening(tokenizer))


def encode_row(tokenizer: Any, messages: list[dict[str, str]], answer: str) -> tuple[list[int], int]:
    """`(ids, prompt length)` of one conversation, as in training."""
    (prompt,), (answered,) = _Tokenise(tokenizer).rows([render_prompt(tokenizer, messages)], [answer.strip()])
    prompt = _with_bos(prompt, _opening(tokenizer))
    return prompt + answered, len(prompt)


def end_of_turn(tokenizer: Any) -> int:
    """Id of the token that ends an answer by the chat template; need not be the tokenizer's own end token."""
    return tokenizer.convert_tokens_to_ids(find_turn(tokenizer).end)


def _opening(tokenizer: Any) -> list[int]:
    opening = tokenizer("").input_ids[:1]
    return opening if opening == [tokenizer.bos_token_id] else []


def _with_bos(ids: list[int], opening: list[int]) -> list[int]:
    return opening + ids if opening and ids[:1] != opening else ids


def fit_row(name: str, prompt: list[int], answer: list[int], limit: int, overlength: str) -> tuple[list[int], int] | None:
    """`(ids, prompt length)` of a row of at most `limit` tokens; None when it is dropped for its length.

    Raises DataError for a row over the limit under `error`, or whose answer alone is over it.
    """
    total = len(prompt) + len(answer)
    if total <= limit:
        return prompt + answer, len(prompt)
    if overlength == "drop":
        return None
    if overlength == "truncate_prompt" and len(answer) < limit:
        # The head holds the instructions and the tail the situation, so the middle goes.
        keep = limit - len(answer)
        return prompt[:keep - keep // 2] + prompt[len(prompt) - keep // 2:] + answer, keep
    raise DataError(f"record {name}: {total} tokens ({len(answer)} of them answer), model.max_seq_length is {limit}; "
                    "raise it, or set dataset.overlength to drop or truncate_prompt (an answer is never cut)")


def encode(records: Iterable[Record], tokenizer: Any, resolved: Resolved, limit: int | None = None, ground: Callable[[Record], Record] = lambda record: record,
           processes: int = 1) -> Iterator[Encoded]:
    """Tokenise records in order, a batch at a time, under `dataset.overlength`; `limit` replaces `model.max_seq_length`, `ground` finds a record's
    cards. processes: among which the batches of long data are divided, to the same rows."""
    dataset = resolved.config.dataset
    limit = limit or resolved.config.model.max_seq_length
    cards = load_cards() if dataset.grounding == "cards" else {}
    render, opening = PromptRenderer(tokenizer), _opening(tokenizer)
    batched = _Tokenise(tokenizer)

    def one(batch: list[Record]) -> list[Encoded]:
        batch, rows = [ground(record) for record in batch], []
        prompts, answers = batched.rows([render(record_messages(record, cards, dataset.grounding)) for record in batch],
                                        [record.output.strip() for record in batch])
        for record, prompt, answer in zip(batch, prompts, answers):
            prompt = _with_bos(prompt, opening)
            row = fit_row(record.id, prompt, answer, limit, dataset.overlength)
            total = len(prompt) + len(answer)
            if row is None:
                rows.append(Encoded(record, [], 0, total, len(answer)))
            else:
                _check_row(record.id, *row, tokenizer, batched.end)
                rows.append(Encoded(record, *row, total, len(answer)))
        return rows

    for rows in divide(one, _batches(records, BATCH), processes):
        yield from rows


class _Tokenise:
    """Ids of many texts, with no special tokens added; what all prompts begin with is tokenised once. end: id of the token that ends an answer."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        if self._backend is None or self._backend.truncation or self._backend.padding:
            self._backend = None
        # A text may be cut before such a token: the parts around it are tokenised apart in any case.
        self._cuts = [token.content for token in tokenizer.added_tokens_decoder.values()
                      if token.special and not (token.normalized or token.lstrip or token.single_word)] if self._backend else []
        self._head, self._head_ids = "", list[int]()
        self._turn = find_turn(tokenizer)
        self.end: int = tokenizer.convert_tokens_to_ids(self._turn.end)

    def __call__(self, texts: list[str]) -> list[list[int]]:
        if self._backend is None:
            return self._tokenizer(texts, add_special_tokens=False, return_attention_mask=False).input_ids
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def rows(self, prompts: list[str], answers: list[str]) -> tuple[list[list[int]], list[list[int]]]:
        """`(ids of prompts, ids of answers with what ends them)`. An answer is tokenised behind the last piece of its prompt, as the template has it."""
        cuts = [max([0, *(prompt.rfind(token) for token in self._cuts)]) for prompt in prompts]
        tails = [prompt[cut:] for prompt, cut in zip(prompts, cuts)]
        distinct = list(dict.fromkeys(tails))
        ids_of = dict(zip(distinct, self(distinct)))
        wholes = self([f"{tail}{self._turn.lead}{answer}{self._turn.closing}" for tail, answer in zip(tails, answers)])
        answered = []
        for tail, answer, whole in zip(tails, answers, wholes):
            before = ids_of[tail]
            answered.append(whole[len(before):] if whole[:len(before)] == before else [*self([answer])[0], self.end])
        heads = self.heads([prompt[:cut] for prompt, cut in zip(prompts, cuts)])
        return [head + ids_of[tail] for head, tail in zip(heads, tails)], answered

    def heads(self, texts: list[str]) -> list[list[int]]:
        """Ids of what prompts begin with, the first of it the same by the template."""
        if not self._head or not all(text.startswith(self._head) for text in texts):
            same = os.path.commonprefix(texts)
            cut = max((same.rfind(token) for token in self._cuts), default=0)
            self._head = same[:max(cut, 0)]
            self._head_ids, = self([self._head])
        return [self._head_ids + ids for ids in self([text[len(self._head):] for text in texts])]


def _batches(records: Iterable[Record], size: int) -> Iterator[list[Record]]:
    batch: list[Record] = []
    for record in records:
        batch.append(record)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _check_row(name: str, row: list[int], prompt: int, tokenizer: Any, end: int) -> None:
    if prompt >= len(row) - 1:
        raise DataError(f"record {name}: no supervised token; its answer has no text")
    if row[-1] != end:
        raise DataError(f"record {name}: its last label is not the end token {tokenizer.convert_ids_to_tokens(end)!r}")
    if tokenizer.bos_token_id is not None and row[:2] == [tokenizer.bos_token_id] * 2:
        raise DataError(f"record {name}: begins with two {tokenizer.bos_token!r}; check the chat template")


def build_rows(records: Iterable[Record], tokenizer: Any, resolved: Resolved, folder: Path | None = None, ground: Callable[[Record], Record] = lambda record: record,
               processes: int = 1) -> TokenRows:
    """Tokenise records into memory, or into `folder` with no more than a few batches in memory. ground, processes: see `encode`.

    What was dropped or truncated is counted and printed, and fatal under `dataset.strict`.
    """
    ids, starts, prompts = array("i"), array("q", [0]), array("i")
    changed: dict[str, list[str]] = {"dropped": [], "truncated in the prompt": []}
    stream = (folder / "ids.bin").open("wb") if folder else None
    try:
        for row in encode(records, tokenizer, resolved, None, ground, processes):
            kind = "dropped" if not row.ids else "truncated in the prompt" if len(row.ids) < row.tokens else ""
            if kind:
                changed[kind].append(row.record.id)
            if kind == "dropped":
                continue
            ids.extend(row.ids)
            starts.append(starts[-1] + len(row.ids))
            prompts.append(row.prompt)
            if stream and len(ids) >= 1 << 20:
                ids.tofile(stream)
                del ids[:]
        if stream:
            ids.tofile(stream)
    finally:
        if stream:
            stream.close()
    say_changed(changed, len(prompts), resolved)
    rows = TokenRows(np.asarray(ids, np.int32), np.asarray(starts, np.int64), np.asarray(prompts, np.int32))
    if folder:
        np.savez(folder / "rows.npz", starts=rows.starts, prompts=rows.prompts)
        (folder / "overlength.json").write_text(json.dumps(changed, ensure_ascii=False), encoding="utf-8")
        return TokenRows(map_ids(folder / "ids.bin"), rows.starts, rows.prompts)
    return rows


def say_changed(changed: dict[str, list[str]], rows: int, resolved: Resolved) -> None:
    """Print how many records were dropped or cut for their length; raises DataError under `dataset.strict` or where none is left."""
    limit = resolved.config.model.max_seq_length
    for kind, names in changed.items():
        if names:
            message = f"{len(names)} of {rows + len(changed['dropped'])} records over {limit} tokens {kind}, first {names[0]}"
            if resolved.config.dataset.strict:
                raise DataError(f"{message}; dataset.strict makes it fatal")
            print(message, flush=True)
    if not rows:
        raise DataError(f"no record is within model.max_seq_length {limit}; raise it")


def map_ids(path: Path) -> np.ndarray:
    """The ids of all rows, int32, paged in as they are read."""
    return np.memmap(path, np.int32, "r")
