"""Tokens: records become rows of ids in which only the answer and its end token are supervised.

In: a split, the tokenizer with its chat template. Out: `TokenRows`, read from disk as they are needed.
A row is prompt ids, answer ids, end-of-turn id; the label of the first part is IGNORE. Labels come
from these segments, never from a search in the text. A cache folder is named by a hash of all that
shapes it, code included, so it cannot be stale; it appears whole or not at all.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import shutil
import time
import zipfile
from array import array
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Iterable, Iterator, Sequence

import numpy as np

from emergency_kit.artifacts import hash_file, hash_json, staged_folder
from emergency_kit.config import Resolved
from emergency_kit.data.format import PromptRenderer, Record, record_messages, render_prompt
from emergency_kit.data.rejected import RejectedList, say_rejected
from emergency_kit.errors import DataError
from emergency_kit.knowledge.cards import load_cards

if TYPE_CHECKING:
    from emergency_kit.data.load import Split

IGNORE = -100
# Records tokenised in one call: enough to amortise it, few enough to stay in the cache.
BATCH = 256
_PACKAGE = Path(__file__).resolve().parent.parent
# What these files and packages do decides which tokens a record becomes.
_CODE = ("data/columns.py", "data/duplicates.py", "data/format.py", "data/formats.py", "data/load.py", "data/sources.py", "data/tokenize.py",
         "knowledge/cards.py", "knowledge/emergency_numbers.py", "knowledge/emergency_numbers.yaml", "knowledge/retrieve.py")
_LIBRARIES = ("bm25s", "numpy", "rensa", "tokenizers", "transformers")


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


def encode(records: Iterable[Record], tokenizer: Any, resolved: Resolved, limit: int | None = None) -> Iterator[Encoded]:
    """Tokenise records in order, a batch at a time, under `dataset.overlength`; `limit` replaces `model.max_seq_length`."""
    dataset = resolved.config.dataset
    limit = limit or resolved.config.model.max_seq_length
    cards = load_cards()
    render, opening, end = PromptRenderer(tokenizer), _opening(tokenizer), [tokenizer.eos_token_id]
    for batch in _batches(records, BATCH):
        prompts = _tokenise(tokenizer, [render(record_messages(record, cards, dataset.grounding)) for record in batch])
        answers = _tokenise(tokenizer, [record.output.strip() for record in batch])
        for record, prompt, answer in zip(batch, prompts, answers):
            prompt, answer = _with_bos(prompt, opening), answer + end
            row = fit_row(record.id, prompt, answer, limit, dataset.overlength)
            total = len(prompt) + len(answer)
            if row is None:
                yield Encoded(record, [], 0, total, len(answer))
            else:
                _check_row(record.id, *row, tokenizer)
                yield Encoded(record, *row, total, len(answer))


def _tokenise(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.truncation or backend.padding:
        return tokenizer(texts, add_special_tokens=False, return_attention_mask=False).input_ids
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def _batches(records: Iterable[Record], size: int) -> Iterator[list[Record]]:
    batch: list[Record] = []
    for record in records:
        batch.append(record)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _check_row(name: str, row: list[int], prompt: int, tokenizer: Any) -> None:
    if prompt >= len(row) - 1:
        raise DataError(f"record {name}: no supervised token; its answer has no text")
    if row[-1] != tokenizer.eos_token_id:
        raise DataError(f"record {name}: its last label is not the end token {tokenizer.eos_token!r}")
    if tokenizer.bos_token_id is not None and row[:2] == [tokenizer.bos_token_id] * 2:
        raise DataError(f"record {name}: begins with two {tokenizer.bos_token!r}; check the chat template")


def build_rows(records: Iterable[Record], tokenizer: Any, resolved: Resolved, folder: Path | None = None) -> TokenRows:
    """Tokenise records into memory, or into `folder` with no more than a batch in memory.

    What was dropped or truncated is counted and printed, and fatal under `dataset.strict`.
    """
    ids, starts, prompts = array("i"), array("q", [0]), array("i")
    changed: dict[str, list[str]] = {"dropped": [], "truncated in the prompt": []}
    stream = (folder / "ids.bin").open("wb") if folder else None
    try:
        for row in encode(records, tokenizer, resolved):
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
    _say_changed(changed, len(prompts), resolved)
    rows = TokenRows(np.asarray(ids, np.int32), np.asarray(starts, np.int64), np.asarray(prompts, np.int32))
    if folder:
        np.savez(folder / "rows.npz", starts=rows.starts, prompts=rows.prompts)
        (folder / "overlength.json").write_text(json.dumps(changed, ensure_ascii=False), encoding="utf-8")
        return TokenRows(_map_ids(folder / "ids.bin"), rows.starts, rows.prompts)
    return rows


def _say_changed(changed: dict[str, list[str]], rows: int, resolved: Resolved) -> None:
    limit = resolved.config.model.max_seq_length
    for kind, names in changed.items():
        if names:
            message = f"{len(names)} of {rows + len(changed['dropped'])} records over {limit} tokens {kind}, first {names[0]}"
            if resolved.config.dataset.strict:
                raise DataError(f"{message}; dataset.strict makes it fatal")
            print(message, flush=True)
    if not rows:
        raise DataError(f"no record is within model.max_seq_length {limit}; raise it")


def _map_ids(path: Path) -> np.ndarray:
    return np.memmap(path, np.int32, "r")


@functools.cache
def _code_digest() -> str:
    return hash_json([[hash_file(_PACKAGE / name) for name in _CODE], [importlib.metadata.version(name) for name in _LIBRARIES]])


def cache_key(split_digest: str, tokenizer: Any, resolved: Resolved) -> str:
    """Hash of the records, template, tokenizer, length, overlength rule and of the code that tokenises."""
    backend = tokenizer.backend_tokenizer.to_str() if hasattr(tokenizer, "backend_tokenizer") else str(sorted(tokenizer.get_vocab().items()))
    sample = render_prompt(tokenizer, record_messages(Record("", "s", "o", cards=()), load_cards(), resolved.config.dataset.grounding))
    return hash_json([_code_digest(), split_digest, resolved.config.dataset.overlength, resolved.config.model.max_seq_length,
                      tokenizer.chat_template, backend, [tokenizer.bos_token, tokenizer.eos_token], sample])


def cache_folder(resolved: Resolved) -> Path:
    """Where tokenised splits are kept."""
    return Path(resolved.config.training.output_dir) / "cache"


def load_rows(split: Split, tokenizer: Any, resolved: Resolved) -> TokenRows:
    """Rows of a split from the cache under `<output_dir>/cache/`, or tokenised now and cached.

    One process at a time tokenises; another one that wants the same rows waits and takes them from the cache.
    """
    digest = split.digest()
    folder = cache_folder(resolved) / f"tokens-{cache_key(digest, tokenizer, resolved)[:24]}"
    rows = _read_cached(folder, resolved)
    if rows is None:
        with cache_lock(folder.parent):
            rows = _read_cached(folder, resolved) or _build_cached(folder, split, digest, tokenizer, resolved)
    return rows


@contextlib.contextmanager
def cache_lock(folder: Path, wait: bool = True) -> Iterator[None]:
    """Hold the cache for writing; the system frees it when a process dies. Raises filelock.Timeout without `wait`."""
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if not wait:
            raise
        print(f"Waiting for another process that tokenises into {folder}", flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _build_cached(folder: Path, split: Split, digest: str, tokenizer: Any, resolved: Resolved) -> TokenRows:
    remove_leftovers(folder.parent)
    with staged_folder(folder) as temporary:
        with RejectedList(split, temporary / "rejected.jsonl", shown_as=folder / "rejected.jsonl"):
            rows = build_rows(split, tokenizer, resolved, temporary)
        if split.digest() != digest:
            raise DataError(f"dataset {split.source.name}: changed while it was read; run again")
        about = {"dataset": split.source.name, "split": split.name, "said": split.said, "rows": len(rows), "tokens": len(rows.ids),
                 "supervised": rows.supervised, "rejected": dict(split.rejected), "made": time.time(),
                 "files": {name: hash_quickly(temporary / name) for name in ("ids.bin", "rows.npz", "overlength.json")}}
        (temporary / "about.json").write_text(json.dumps(about, indent=1, ensure_ascii=False), encoding="utf-8")
    return TokenRows(_map_ids(folder / "ids.bin"), rows.starts, rows.prompts)


def _read_cached(folder: Path, resolved: Resolved) -> TokenRows | None:
    if not folder.exists():
        return None
    try:
        about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        rejected: Counter[str] = Counter(about["rejected"])
        damaged = [name for name, digest in about["files"].items() if hash_quickly(folder / name) != digest]
        if damaged or not about["files"]:
            raise ValueError(f"{', '.join(damaged)} differs from its checksum")
        changed = json.loads((folder / "overlength.json").read_text(encoding="utf-8"))
        with np.load(folder / "rows.npz") as stored:
            rows = TokenRows(_map_ids(folder / "ids.bin"), stored["starts"], stored["prompts"])
        said = "\n".join(about["said"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        print(f"{folder}: not readable ({error}), tokenised anew", flush=True)
        return None
    with contextlib.suppress(OSError):  # a cache that may only be read is as good
        (folder / "about.json").touch()  # the time of the last use, for `data cache prune`
    print(said, flush=True)
    if rejected:
        say_rejected(about["split"], rejected, folder / "rejected.jsonl")
        if resolved.config.dataset.strict:
            raise DataError(f"{folder / 'rejected.jsonl'}: {rejected.total()} rows rejected; mend or remove them (dataset.strict makes it fatal)")
    _say_changed(changed, len(rows), resolved)
    return rows


def remove_leftovers(folder: Path) -> tuple[int, int]:
    """Remove what processes that died left in the cache; `(how many, bytes)`. The cache must be held."""
    removed = freed = 0
    for path in folder.glob(".*"):
        if path.suffix in (".partial", ".retired") and path.is_dir():
            freed += sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
            shutil.rmtree(path)
            removed += 1
    return removed, freed


def hash_quickly(path: Path) -> str:
    """xxh3 of a file: finds damage, at the speed of reading."""
    import xxhash

    digest = xxhash.xxh3_64()
    with path.open("rb") as stream:
        while piece := stream.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()
