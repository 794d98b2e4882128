"""The cache of tokenised splits: rows from it or into it, what is in it, and making room.

In: a `Split`, the tokenizer. Out: `TokenRows`, read from disk as they are needed. An entry's folder under
`<output_dir>/cache/` is named by a hash of all that shapes it, code included, so it cannot be stale; it
appears whole or not at all. One process at a time writes; what a killed one left goes with the next.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import shutil
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Iterator

import numpy as np
import xxhash
from filelock import FileLock, Timeout

from emergency_kit.artifacts import hash_file, hash_json
from emergency_kit.config import Resolved
from emergency_kit.data.format import Record, record_messages
from emergency_kit.data.grounding import grounding
from emergency_kit.data.rejected import RejectedList, say_rejected
from emergency_kit.data.template import render_prompt
from emergency_kit.data.tokenize import TokenRows, build_rows, map_ids, say_changed
from emergency_kit.errors import DataError
from emergency_kit.files import folder_bytes, staged_folder
from emergency_kit.knowledge.cards import load_cards
from emergency_kit.model.process_memory import cores

if TYPE_CHECKING:
    from emergency_kit.data.load import Split

DAY_SECONDS = 86400
_PACKAGE = Path(__file__).resolve().parent.parent
# What these files and packages do decides which tokens a record becomes.
_CODE = ("data/cache.py", "data/columns.py", "data/divide.py", "data/duplicates.py", "data/format.py", "data/formats.py", "data/grounding.py",
         "data/load.py", "data/remote.py", "data/sources.py", "data/template.py", "data/tokenize.py",
         "knowledge/cards.py", "knowledge/emergency_numbers.py", "knowledge/emergency_numbers.yaml", "knowledge/index.py", "knowledge/retrieve.py")
_LIBRARIES = ("numpy", "rensa", "tokenizers", "transformers")


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
    rows = _read_entry(folder, resolved)
    if rows is None:
        with lock_cache(folder.parent):
            # Another process may have made it meanwhile.
            rows = _read_entry(folder, resolved, say=True)
            if rows is None:
                rows = _build_entry(folder, split, digest, tokenizer, resolved)
    return rows


@contextlib.contextmanager
def lock_cache(folder: Path, wait: bool = True) -> Iterator[None]:
    """Hold the cache for writing; the system frees it when a process dies. Raises filelock.Timeout without `wait`."""
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


def _build_entry(folder: Path, split: Split, digest: str, tokenizer: Any, resolved: Resolved) -> TokenRows:
    remove_leftovers(folder.parent)
    with staged_folder(folder) as temporary:
        with RejectedList(split, temporary / "rejected.jsonl", shown_as=folder / "rejected.jsonl"):
            rows = build_rows(split.chosen(), tokenizer, resolved, temporary, grounding(split.dataset), resolved.config.dataset.processes or cores())
        if split.digest() != digest:
            raise DataError(f"dataset {split.source.name}: changed while it was read; run again")
        about = {"dataset": split.source.name, "split": split.name, "said": split.said, "rows": len(rows), "tokens": len(rows.ids),
                 "supervised": rows.supervised, "rejected": dict(split.rejected), "made": time.time(),
                 "files": {path.name: hash_quickly(path) for path in sorted(temporary.iterdir())}}
        text = json.dumps(about | {"self": hash_json(about)}, indent=1, ensure_ascii=False)
        (temporary / "about.json").write_text(text, encoding="utf-8")
    return TokenRows(map_ids(folder / "ids.bin"), rows.starts, rows.prompts)


def _read_entry(folder: Path, resolved: Resolved, say: bool = False) -> TokenRows | None:
    if not folder.exists():
        return None
    try:
        about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        damaged = ["about.json"] if about.pop("self") != hash_json(about) else []
        damaged += [name for name, digest in about["files"].items() if hash_quickly(folder / name) != digest]
        if damaged:
            raise ValueError(f"{', '.join(damaged)} differs from its checksum")
        changed = json.loads((folder / "overlength.json").read_text(encoding="utf-8"))
        with np.load(folder / "rows.npz") as stored:
            rows = TokenRows(map_ids(folder / "ids.bin"), stored["starts"], stored["prompts"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if say:
            print(f"{folder}: not readable ({error}), tokenised anew", flush=True)
        return None
    with contextlib.suppress(OSError):  # a cache that may only be read is as good
        (folder / "about.json").touch()  # the time of the last use, for `data cache prune`
    for line in about["said"]:
        print(line, flush=True)
    if rejected := Counter(about["rejected"]):
        say_rejected(about["split"], rejected, folder / "rejected.jsonl")
        if resolved.config.dataset.strict:
            raise DataError(f"{folder / 'rejected.jsonl'}: {rejected.total()} rows rejected; mend or remove them (dataset.strict makes it fatal)")
    say_changed(changed, len(rows), resolved)
    return rows


def remove_leftovers(folder: Path) -> tuple[int, int]:
    """Remove what processes that died left in the cache; `(how many, bytes)`. The cache must be held."""
    removed = freed = 0
    for path in folder.glob(".*"):
        if path.suffix in (".partial", ".retired") and path.is_dir():
            freed += folder_bytes(path)
            shutil.rmtree(path)
            removed += 1
    return removed, freed


def hash_quickly(path: Path) -> str:
    """xxh3 of a file: finds damage, at the speed of reading."""
    digest = xxhash.xxh3_64()
    with path.open("rb") as stream:
        while piece := stream.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


@dataclass(frozen=True)
class Entry:
    """A cached split. size_bytes: on disk; used: seconds since the epoch."""

    folder: Path
    dataset: str
    split: str
    rows: int
    tokens: int
    size_bytes: int
    used: float


def list_entries(folder: Path) -> list[Entry]:
    """Whole entries, the one used last first."""
    entries = []
    for about in folder.glob("tokens-*/about.json"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            known = json.loads(about.read_text(encoding="utf-8"))
            entries.append(Entry(about.parent, known["dataset"], known["split"], known["rows"], known["tokens"], folder_bytes(about.parent), about.stat().st_mtime))
    return sorted(entries, key=lambda entry: -entry.used)


def list_cache(resolved: Resolved) -> None:
    """Print every entry and the size of all."""
    folder = cache_folder(resolved)
    entries = list_entries(folder)
    for entry in entries:
        days = (time.time() - entry.used) / DAY_SECONDS
        print(f"{entry.folder.name}  {entry.dataset} {entry.split}: {entry.rows:,} rows, {entry.tokens:,} tokens, {entry.size_bytes / 1e6:.1f} MB, used {days:.1f} days ago")
    print(f"{len(entries)} tokenised splits in {folder}, {sum(entry.size_bytes for entry in entries) / 1e6:.1f} MB"
          + ("; make room: emergency-kit data cache prune" if entries else ""))


def prune_cache(resolved: Resolved, days: float) -> None:
    """Remove entries not used for `days`, damaged ones, and leftovers of processes that died.

    Raises DataError while another process writes to the cache.
    """
    folder = cache_folder(resolved)
    try:
        with lock_cache(folder, wait=False):
            removed, freed = remove_leftovers(folder)
            recent = {entry.folder for entry in list_entries(folder) if time.time() - entry.used < days * DAY_SECONDS}
            for path in set(folder.glob("tokens-*")) - recent:
                freed += folder_bytes(path)
                shutil.rmtree(path)
                removed += 1
    except Timeout:
        raise DataError(f"{folder}: another process is tokenising into it; prune again when it is done") from None
    print(f"{removed} removed from {folder}, {freed / 1e6:.1f} MB freed; {len(recent)} kept")
