"""Test data: rows written in every format and packing that the kit reads, and the config that reads them."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any, Mapping, Sequence

import pyarrow as pa
import pyarrow.parquet as parquet

from emergency_kit.config import Resolved, load_config

Rows = Sequence[Mapping[str, Any]]


def resolve(source: object, *settings: str, profile: str = "embedded") -> Resolved:
    """The config with a local dataset, all of its rows and no cards in its prompts, unless a setting says otherwise."""
    defaults = ("model.device=cpu", "model.max_seq_length=1024", "dataset.grounding=none", "dataset.max_samples=null", "dataset.max_eval_samples=null")
    return load_config(profile, settings=[*defaults, f"dataset.name={source}", *settings])


def write(path: Path, *rows: object) -> Path:
    """A JSONL file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def _as_csv(rows: Rows, delimiter: str = ",") -> bytes:
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=delimiter)
    names = list(rows[0])
    writer.writerow(names)
    for row in rows:
        writer.writerow([json.dumps(row[name]) if isinstance(row[name], (list, tuple)) else row[name] for name in names])
    return text.getvalue().encode()


def _as_arrow(rows: Rows, stream: bool) -> bytes:
    table = pa.Table.from_pylist([dict(row) for row in rows])
    sink = io.BytesIO()
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    return sink.getvalue()


def _as_parquet(rows: Rows) -> bytes:
    sink = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist([dict(row) for row in rows]), sink, row_group_size=4)
    return sink.getvalue()


FORMATS = {
    "jsonl": lambda rows: "".join(json.dumps(row) + "\n" for row in rows).encode(),
    "ndjson": lambda rows: b"\xef\xbb\xbf" + "".join(json.dumps(row, ensure_ascii=False) + "\r\n\n" for row in rows).encode(),
    "json": lambda rows: json.dumps(list(rows)).encode(),
    "csv": _as_csv,
    "tsv": lambda rows: _as_csv(rows, "\t"),
    "parquet": _as_parquet,
    "arrow": lambda rows: _as_arrow(rows, stream=False),
    "stream.arrow": lambda rows: _as_arrow(rows, stream=True),
}
PACKINGS = {"": lambda data: data, ".gz": gzip.compress, ".zst": lambda data: pa.compress(data, codec="zstd", asbytes=True)}
