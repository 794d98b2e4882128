"""Sources: a dataset's name becomes rows of a split, read one after the other.

In: `dataset.name`: a folder, a file, a glob, an address of any of these, or a Hub dataset. Out: `Row`s in file and position order, or a
`DataError`. Files and folders are told from Hub names by what is on the disk and by how the name is
written. A file that changes while it is read is noticed by `digest`, not here.
"""

from __future__ import annotations

import glob
import os
import re
from pathlib import Path, PurePath
from typing import Any, Callable, Iterator, TypeVar

import numpy as np

from emergency_kit.artifacts import hash_file, hash_json
from emergency_kit.config import DatasetConfig
from emergency_kit.data.formats import READERS, File, Row, format_of, read_file
from emergency_kit.data.lanes import Lanes, deal, deal_shards
from emergency_kit.data.remote import Remote, failures, find_remote, is_remote
from emergency_kit.errors import DataError

_OTHER_NAMES = {"validation": ("valid", "val", "dev"), "train": ("training",)}
# Category and near-duplicate group of each record of a split, once they have been worked out.
Measured = dict[str, tuple[np.ndarray, np.ndarray | None]]
T = TypeVar("T")
_NOT_DATA = ("manifest.json", "dataset_info.json", "state.json", "dataset_dict.json")


class Files:
    """Files, local or remote, each assigned to a split by its name; files that name no split are the training split."""

    def __init__(self, name: str, dataset: DatasetConfig):
        self.name = name
        root, paths = _find(name)
        wanted = (dataset.train_split, dataset.validation_split, dataset.test_split)
        named = {path: _split_of((path.pure if isinstance(path, Remote) else path).relative_to(root), wanted) for path in paths}
        if not any(named.values()):
            named = dict.fromkeys(paths, dataset.train_split)
        files = {split: [path for path in paths if named[path] == split] for split in wanted}
        self._files = {split: found for split, found in files.items() if found}
        # With splits named beside it, a file of no split (notes, a rejected list) is not data.
        self.ignored = [path for path in paths if not named[path]]
        self._streamed = dataset.train_split if dataset.streaming else None
        self.groups: Measured = {}

    def splits(self) -> list[str]:
        """Names of the splits that have files: train, validation, test."""
        return list(self._files)

    def files(self, split: str) -> list[File]:
        """Files of a split; raises DataError where there are none."""
        if split not in self._files:
            raise DataError(f"dataset {self.name}: no split {split!r}; it has {', '.join(self._files)}. Next: name its splits with dataset.train_split and the like")
        return self._files[split]

    def describe(self, split: str) -> str:
        """The file of a split, or how many there are."""
        files = self.files(split)
        return str(files[0]) if len(files) == 1 else f"{len(files)} files of {self.name}"

    def rows(self, split: str) -> Iterator[Row]:
        """Rows of a split, in file and position order."""
        for path in self.files(split):
            yield from read_file(path)

    def lanes(self, split: str, most: int) -> Lanes:
        """A split's files dealt evenly by their bytes into lanes, `most` at most. Raises DataError where a size cannot be asked for."""
        return deal(self._ask(split, lambda path: path.size_bytes() if isinstance(path, Remote) else path.stat().st_size), most)

    def stream(self, split: str, lanes: Lanes, lane: int) -> Any:
        """The rows of one of a split's lanes as a `datasets.IterableDataset`, whose state can be kept; a shard a file."""
        from datasets import IterableDataset

        files = self.files(split)
        return IterableDataset.from_generator(_read_all, gen_kwargs={"files": [files[place] for place in lanes.parts[lane]]})

    def digest(self, split: str) -> str:
        """sha256 over the bytes of a split's files, whatever they are called; of remote ones over what their server says of them, and of
        those that are streamed, which are not read for it, over their sizes and times of change."""
        def content(path: File) -> str:
            if isinstance(path, Remote):
                return path.digest()
            return hash_json([path.stat().st_size, path.stat().st_mtime_ns]) if split == self._streamed else hash_file(path)

        return hash_json(self._ask(split, lambda path: [format_of(path), content(path)]))

    def _ask(self, split: str, question: Callable[[File], T]) -> list[T]:
        """The answer for each file of a split."""
        try:
            return [question(path) for path in self.files(split)]
        except failures() as error:
            raise DataError(f"dataset {getattr(error, 'filename', None) or self.name}: cannot be read ({getattr(error, 'strerror', None) or error})") from None


class Hub:
    """A dataset on the Hub, cached by the `datasets` library and read from there when offline."""

    def __init__(self, dataset: DatasetConfig):
        import httpx
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError
        from huggingface_hub import HfApi

        name, _, revision = dataset.name.partition(":")
        self.name = dataset.name
        if revision and dataset.revision and revision != dataset.revision:
            raise DataError(f"dataset {dataset.name}: dataset.revision is {dataset.revision!r}; name one revision")
        revision = dataset.revision or revision
        self._commit = ""
        try:
            if dataset.streaming:
                # Fixed, so that the rows stay the same whatever is pushed meanwhile.
                revision = self._commit = HfApi().dataset_info(name, revision=revision or None).sha or ""
            self._data = load_dataset(name, dataset.config_name, revision=revision or None, streaming=dataset.streaming)
        # RuntimeError: a dataset that is a script, which `datasets` no longer runs.
        except (DatasetsError, OSError, ValueError, RuntimeError, httpx.HTTPError) as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
            raise DataError(f"dataset {dataset.name}: cannot be loaded from the Hub ({first}); check the name, the network and, for a private "
                            "one, HF_TOKEN, or use local files: --set dataset.name=FILE") from None
        if not dataset.streaming:
            self._check_revision(name, revision or "main")
        self._actual = {split: split for split in self._data}
        for wanted in (dataset.train_split, dataset.validation_split):
            for other in _OTHER_NAMES.get(wanted, ()):
                if wanted not in self._actual and other in self._data:
                    self._actual[wanted] = self._actual.pop(other)
        self.groups: Measured = {}

    def _check_revision(self, name: str, revision: str) -> None:
        """Where the Hub does not answer, `datasets` takes whatever revision it cached last; another than the one asked for must not pass."""
        from huggingface_hub.constants import HF_HUB_CACHE
        from huggingface_hub.file_download import repo_folder_name

        reference = Path(HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type="dataset"), "refs", revision)
        commit = reference.read_text().strip() if reference.is_file() else revision
        files = next(iter(self._data.values())).cache_files
        loaded = Path(files[0]["filename"]).parent.name if files else commit
        if loaded != commit:
            raise DataError(f"dataset {self.name}: revision {revision!r} is not to be had; the Hub cannot be reached, and the last one in the cache "
                            f"is commit {loaded[:12]}. Next: check dataset.revision and the network")

    def splits(self) -> list[str]:
        """Names of the splits; `dev` and the like are called what the config calls them."""
        return list(self._actual)

    def rows(self, split: str) -> Iterator[Row]:
        """Rows of a split, in order."""
        for number, row in enumerate(self._split(split), 1):
            yield Row(f"{self.name}/{split}:{number}", row)

    def _split(self, split: str) -> Any:
        if split not in self._actual:
            raise DataError(f"dataset {self.name}: no split {split!r}; it has {', '.join(self._data)}. Next: name its splits with dataset.train_split and the like")
        return self._data[self._actual[split]]

    def describe(self, split: str) -> str:
        """The dataset's and the split's name."""
        return f"{self.name} ({self._actual[split]})"

    def lanes(self, split: str, most: int) -> Lanes:
        """A split's shards, as `datasets` counts them, dealt evenly by number into lanes, `most` at most."""
        return deal_shards(self._split(split).num_shards, most)

    def stream(self, split: str, lanes: Lanes, lane: int) -> Any:
        """The rows of one of a split's lanes as a `datasets.IterableDataset`, whose state can be kept."""
        data, where = self._split(split), f"{self.name}/{split}"
        if len(lanes) > 1:
            data, where = data.shard(len(lanes), lane, contiguous=False), f"{where}, lane {lane} of {len(lanes)}"
        return data.map(lambda value, number: {"place": f"{where}:{number + 1}", "value": value, "problem": ""}, with_indices=True, remove_columns=self._split(split).column_names)

    def digest(self, split: str) -> str:
        """Fingerprint that the `datasets` library keeps of a split's content; of a streamed one its commit."""
        if self._commit:
            return hash_json(["hub", self.name, self._commit, self._actual[split]])
        return hash_json(["hub", self._split(split)._fingerprint])


def _read_all(files: list[File]) -> Iterator[dict[str, Any]]:
    for path in files:
        for row in read_file(path):
            yield {"place": row.place, "value": row.value, "problem": row.problem}


def open_source(dataset: DatasetConfig, embedded: Path | None = None) -> Files | Hub:
    """The source that `dataset.name` means; `embedded` is the folder of the built dataset.

    Raises DataError where it does not exist or cannot be opened.
    """
    if dataset.name == "embedded":
        return Files(str(embedded), dataset)
    if is_remote(dataset.name):
        return Files(dataset.name, dataset)
    name = os.path.expanduser(dataset.name)
    local = os.path.exists(name) or name.startswith((".", os.sep)) or name != dataset.name or any(mark in name for mark in "*?[")
    local = local or name.partition(":")[0].count("/") > 1 or format_of(Path(name)) in READERS
    return Files(name, dataset) if local else Hub(dataset)


def _find(name: str) -> tuple[PurePath, list[File]]:
    """`(folder below which names tell the split, files)`."""
    path = Path(name)
    root: PurePath
    found: list[File]
    if is_remote(name):
        root, remote = find_remote(name)
        found = [file for file in remote if not file.name.startswith(".") and file.name not in _NOT_DATA]
    elif path.is_dir():
        # One level of folders: `train/data-00000.arrow`, as `save_to_disk` writes them.
        root = path
        inside = sorted(file for pattern in ("*", "*/*") for file in path.glob(pattern) if file.is_file() and not file.name.startswith("."))
        found = [file for file in inside if file.name not in _NOT_DATA]
    elif path.is_file():
        root, found = path.parent, [path]
    else:
        root = Path(re.split(r"[^/]*[*?\[]", name, maxsplit=1)[0] or ".")
        found = [Path(match) for match in sorted(glob.glob(name, recursive=True)) if Path(match).is_file()]
        if not found:
            what = "no file matches" if any(mark in name for mark in "*?[") else "no such file or folder"
            raise DataError(f"dataset {name}: {what}; check dataset.name")
    readable = [file for file in found if format_of(file) in READERS]
    if not readable:
        raise DataError(f"dataset {name}: no file that can be read; expected {', '.join(READERS)}, plain, .gz or .zst")
    return root, readable


def _split_of(path: PurePath, wanted: tuple[str, ...]) -> str | None:
    """Split that a folder or a file is named after, at either end: `test.csv`, `test-00001.parquet`, `pans_test.jsonl`, `test/data.arrow`."""
    names = [folder.lower() for folder in path.parts[:-1]] + [path.name.lower().split(".")[0]]
    for split in wanted:
        for known in (split.lower(), *_OTHER_NAMES.get(split, ())):
            if any(re.search(rf"^{re.escape(known)}(?![a-z0-9])|(?<![a-z0-9]){re.escape(known)}$", name) for name in names):
                return split
    return None
