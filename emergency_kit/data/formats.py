"""Formats: the rows of one file, whatever it is packed in.

In: a .jsonl, .json, .csv, .tsv, .parquet or .arrow file, plain, .gz or .zst, local or remote. Out: `Row`s with the place
they came from; a line that cannot be read is a `Row` with a problem, a file that cannot be read is a
`DataError`. Memory does not grow with the file, except for .json and for packed .parquet and .arrow
files, which are read whole.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Callable, Iterator, Mapping

import pyarrow as pa

from emergency_kit.data.remote import Remote, failures
from emergency_kit.errors import DataError

File = Path | Remote
PACKED = (".gz", ".zst")
# Rows of a table that are Python objects at a time.
_TABLE_ROWS = 256
csv.field_size_limit(2**31 - 1)


@dataclass(frozen=True, slots=True)
class Row:
    """One row. place: `file:line`, or `file:row` in a table. problem: why it cannot be read, then `value` holds what is there."""

    place: str
    value: Mapping[str, Any]
    problem: str = ""


def format_of(path: File) -> str:
    """`.jsonl` of `train.jsonl.gz`."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in PACKED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def read_file(path: File) -> Iterator[Row]:
    """Rows of one file of any readable format; raises DataError when the file as a whole cannot be read."""
    try:
        if (path.size_bytes() if isinstance(path, Remote) else path.stat().st_size) == 0:
            raise DataError(f"dataset {path}: empty; expected one row or more")
        with _open(path) as stream:
            if stream.peek(2)[:2] in (b"\xff\xfe", b"\xfe\xff") and format_of(path) != ".arrow":
                raise DataError(f"dataset {path}: UTF-16; save the file as UTF-8")
            yield from READERS.get(format_of(path), _read_jsonl)(path, stream)
    except (EOFError, zlib.error, gzip.BadGzipFile, pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"dataset {path}: damaged or cut short ({(str(error).splitlines() or [''])[0][:100]}); get the file again") from None
    except failures() as error:
        raise DataError(f"dataset {path}: cannot be read ({getattr(error, 'strerror', None) or str(error)[:100]}); get the file again or check its permissions") from None


def _open(path: File) -> Any:
    if path.suffix.lower() == ".gz":
        return gzip.open(path.open("rb") if isinstance(path, Remote) else path, "rb")
    if path.suffix.lower() == ".zst":
        packed = pa.PythonFile(path.open("rb")) if isinstance(path, Remote) else pa.OSFile(str(path))
        return io.BufferedReader(_Raw(pa.CompressedInputStream(packed, "zstd")))
    return path.open("rb")


class _Raw(io.RawIOBase):
    """An Arrow stream as one that Python can buffer and read line by line."""

    def __init__(self, stream: pa.NativeFile):
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        buffer[:len(data)] = data
        return len(data)


def _read_jsonl(path: File, stream: BinaryIO) -> Iterator[Row]:
    for number, line in enumerate(stream, 1):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            value = json.loads(line)
        except UnicodeDecodeError as error:
            yield Row(place, {"line": line[:200].decode("utf-8", "replace")}, f"not UTF-8 (byte {error.start} of the line)")
        except (ValueError, RecursionError) as error:
            yield Row(place, {"line": line[:200].decode("utf-8", "replace")}, f"not a whole JSON object ({str(error)[:60]})")
        else:
            yield _object(place, value)


def _object(place: str, value: Any) -> Row:
    return Row(place, value) if isinstance(value, dict) else Row(place, {"value": value}, f"not a JSON object but {type(value).__name__}")


def _read_json(path: File, stream: BinaryIO) -> Iterator[Row]:
    content = stream.read()
    try:
        document = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"dataset {path}: not UTF-8 at byte {error.start}; save the file as UTF-8") from None
    except (ValueError, RecursionError) as error:
        if str(error).startswith("Extra data"):  # one object a line under the name .json
            yield from _read_jsonl(path, io.BytesIO(content))
            return
        raise DataError(f"dataset {path}: not valid JSON ({str(error)[:100]}); one object a line belongs into a .jsonl file") from None
    yield from _items(path, document)


def _items(path: File, document: Any) -> Iterator[Row]:
    """Rows of a document that was read whole: a list of objects, or an object with one such list in it."""
    held = list(document.values()) if isinstance(document, dict) else [document]
    lists = [value for value in held if isinstance(value, list) and all(isinstance(item, dict) for item in value[:1])]
    if len(lists) != 1:
        raise DataError(f"dataset {path}: got {type(document).__name__}; expected a list of objects, or an object with one such list in it")
    for number, value in enumerate(lists[0], 1):
        yield _object(f"{path}:item {number}", value)


def _read_csv(path: File, stream: BinaryIO) -> Iterator[Row]:
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    reader = csv.reader(text, delimiter="\t" if format_of(path) == ".tsv" else ",", strict=True)
    header: list[str] = []
    begin = 1
    while True:
        place = f"{path}:{begin}"
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if not header or "end of data" in str(error):  # an open quote swallows all that follows
                raise DataError(f"dataset {place}: not valid CSV ({error}); check the quotes from this line on") from None
            yield Row(place, {}, f"not valid CSV ({error})")
            begin = reader.line_num + 1
            continue
        begin = reader.line_num + 1
        if not header:
            header = fields
            if twice := [name for name in header if header.count(name) > 1]:
                raise DataError(f"dataset {place}: column {twice[0]!r} stands twice; rename one")
        elif any(fields):
            yield _csv_row(place, header, fields)


def _csv_row(place: str, header: list[str], fields: list[str]) -> Row:
    value = dict(zip(header, fields))
    if len(fields) != len(header):
        return Row(place, value, f"not as many fields as the header ({len(fields)} where it has {len(header)})")
    try:
        "".join(fields).encode()
    except UnicodeEncodeError:
        return Row(place, {name: field.encode("utf-8", "replace").decode() for name, field in value.items()}, "not UTF-8")
    return Row(place, value)


def _read_parquet(path: File, stream: BinaryIO) -> Iterator[Row]:
    import pyarrow.parquet as parquet

    yield from _table_rows(path, parquet.ParquetFile(_seekable(path, stream)).iter_batches(_TABLE_ROWS))


def _read_arrow(path: File, stream: BinaryIO) -> Iterator[Row]:
    data = _seekable(path, stream)
    head = data.read(6)
    data.seek(0)
    if head == b"ARROW1":
        file = pa.ipc.open_file(data)
        yield from _table_rows(path, (file.get_batch(number) for number in range(file.num_record_batches)))
    else:
        yield from _table_rows(path, pa.ipc.open_stream(data))


def _seekable(path: File, stream: BinaryIO) -> BinaryIO:
    return io.BytesIO(stream.read()) if path.suffix.lower() in PACKED else stream


def _table_rows(path: File, batches: Any) -> Iterator[Row]:
    number = 0
    for batch in batches:
        batch.validate(full=True)  # offsets of a damaged file lead anywhere; pyarrow would follow them
        for start in range(0, batch.num_rows, _TABLE_ROWS):
            for row in batch.slice(start, _TABLE_ROWS).to_pylist():
                number += 1
                yield Row(f"{path}:row {number}", row)


READERS: dict[str, Callable[[File, Any], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}
"""What can be read, by the ending of a file's name: the one place that a new format is entered in."""
