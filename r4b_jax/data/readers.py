"""Readers of files of records, one a format: record i as a dict, its pictures as bytes or names.

None keeps a position in its file: each read names its own, so threads need not wait for each
other. Where records begin is looked up once and kept (data/cache.py).

A file that cannot be opened at all is a ConfigError, for the setting that names it is wrong. A
record that cannot be read is a RecordError, and all others are read.
"""

import array
import ast
import bisect
import csv
import io
import itertools
import json
import os
import sys
import tarfile
import threading

import msgpack
import numpy as np
import pyarrow as pa
import pyarrow.parquet
from array_record.python.array_record_module import ArrayRecordReader

from r4b_jax.config import ConfigError
from r4b_jax.data import cache
from r4b_jax.data.records import from_base64
from r4b_jax.data.samples import RecordError

PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm")
BATCH_ROWS = 64  # of a parquet file's copy: what is found at once, not what is read
MAX_REFERENCE = 64  # characters of a TSV's picture cell that names another row; longer is a picture


def open_file(path: str):
    """The reader of a file, by its ending.

    Raises:
      ConfigError: no known ending, or the file cannot be read at all.
    """
    formats = {
        ".json": Json,
        ".jsonl": JsonLines,
        ".parquet": Parquet,
        ".tar": Tar,
        ".array_record": ArrayRecord,
        ".tsv": Tsv,
    }
    kind = formats.get(os.path.splitext(path)[1].lower())
    if kind is None:
        raise ConfigError(f"{path} is of no known format: {' '.join(formats)} are read")
    try:
        return kind(path)
    except ConfigError:
        raise
    except (OSError, ValueError, RecursionError, tarfile.TarError, csv.Error) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None


class Json:
    """A list of records in one JSON file, which memory holds whole."""

    def __init__(self, path: str):
        with open(path, "rb") as f:
            self.records = json.loads(f.read())
        if not isinstance(self.records, list):
            raise ValueError("it holds no list of records")

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> dict:
        return _record(self.records[i])


class JsonLines:
    """A record a line; blank lines do not count."""

    def __init__(self, path: str):
        self.path = path
        spans = cache.cached(["lines"], [path], self._scan)
        self.spans = np.frombuffer(spans, np.int64).reshape(-1, 2)

    def _scan(self) -> bytes:
        """(offset, size) of each record's line."""
        spans, offset = array.array("q"), 0
        with open(self.path, "rb") as f:
            for line in f:
                if not line.isspace():
                    spans.extend((offset, len(line)))
                offset += len(line)
        return spans.tobytes()

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, i: int) -> dict:
        return _json(_read(self.path, *self.spans[i].tolist()))


class Parquet:
    """Rows of a parquet file, through a copy that is not compressed and is read where it lies.

    A row of the file itself costs its whole row group: some thousand pictures.
    """

    def __init__(self, path: str):
        self.path = path
        self.lock = threading.Lock()
        copy = cache.path_of(["parquet", os.path.abspath(path)], ".arrow")
        stamp = json.dumps(cache.stamp_of([path]))
        self.reader = self._open(copy, stamp)
        if self.reader is None:
            self._write(copy, stamp)
            self.reader = self._open(copy, stamp)
        rows = (self.reader.get_batch(k).num_rows for k in range(self.reader.num_record_batches))
        self.ends = list(itertools.accumulate(rows))

    def _open(self, copy: str, stamp: str):
        """The reader of the copy, None where there is none, or of another file, or damaged."""
        try:
            reader = pa.ipc.open_file(pa.memory_map(copy))
        except (OSError, pa.ArrowException):
            return None
        return reader if (reader.schema.metadata or {}).get(b"stamp") == stamp.encode() else None

    def _write(self, copy: str, stamp: str):
        from r4b_jax.common.metrics import Progress  # with JAX, which readers do without

        file = pyarrow.parquet.ParquetFile(self.path)
        schema = file.schema_arrow.with_metadata({"stamp": stamp})
        with (
            cache.replacing(copy) as part,
            pa.OSFile(part, "wb") as out,
            pa.ipc.new_file(out, schema) as writer,
            Progress(f"copy {os.path.basename(self.path)}", file.metadata.num_rows) as progress,
        ):
            for batch in file.iter_batches(BATCH_ROWS):
                writer.write_batch(pa.RecordBatch.from_arrays(batch.columns, schema=schema))
                progress.advance(batch.num_rows)

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, i: int) -> dict:
        k = bisect.bisect_right(self.ends, i)
        with self.lock:
            batch = self.reader.get_batch(k)
        return batch.slice(i - (self.ends[k - 1] if k else 0), 1).to_pylist()[0]


class Tar:
    """WebDataset: the members of one name up to its first dot are one record."""

    def __init__(self, path: str):
        self.path = path
        self.groups, self.damage = cache.cached(["members"], [path], self._scan)

    def _scan(self) -> list:
        """[[key, [[ending, offset, size], ...]], ...] in the order of the file, and what is wrong
        with its end."""
        groups, damage, last = {}, "", None
        with tarfile.open(self.path, "r:") as tar:
            size = os.path.getsize(self.path)
            try:
                for member in tar:
                    folder, name = os.path.split(member.name)
                    key, _, ending = name.partition(".")
                    if member.isfile() and key:
                        last = os.path.join(folder, key)
                        span = [ending.lower(), member.offset_data, member.size]
                        groups.setdefault(last, []).append(span)
                rest = max(min(512, size - tar.offset), 0)
                whole = _read(self.path, tar.offset, rest) == bytes(512)
            except tarfile.TarError:
                whole = False
        if not whole:
            damage = f"the file is cut off or damaged near byte {min(tar.offset, size)}"
            groups.pop(last, None)  # members of it may be lost
            groups["the damaged end"] = []
        return [list(groups.items()), damage]

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, i: int) -> dict:
        key, members = self.groups[i]
        if self.damage and i == len(self) - 1:
            raise RecordError(self.damage)
        record = {"id": key}
        pictures = []
        for ending, offset, size in sorted(members):
            if ending == "json":
                record |= _json(_read(self.path, offset, size))
            elif ending == "txt":
                record["txt"] = _utf8(_read(self.path, offset, size))
            elif ending.split(".")[-1] in PICTURES:
                pictures.append(_read(self.path, offset, size))
        if pictures:  # which the JSON may name
            record = {key: value for key, value in record.items() if key != "image"}
            record["images"] = pictures
        return record


class ArrayRecord:
    """Records as msgpack maps or JSON objects."""

    def __init__(self, path: str):
        self.path = path
        # Nothing is read ahead: records are asked for in any order.
        self.reader = ArrayRecordReader(path, options="readahead_buffer_size:0")
        if not self.reader.ok():
            raise ValueError("it is damaged, or no array_record file")

    def __len__(self) -> int:
        return self.reader.num_records()

    def __getitem__(self, i: int) -> dict:
        try:
            (data,) = self.reader.read([i])
        except RuntimeError as error:
            raise RecordError(f"the record is damaged: {error}") from None
        if data.lstrip().startswith(b"{"):
            return _json(data)
        try:
            return _record(msgpack.unpackb(data, strict_map_key=False))
        except (TypeError, ValueError, msgpack.UnpackException) as error:
            raise RecordError(f"neither msgpack nor JSON: {error}") from None


class Tsv:
    """VLMEvalKit's table: a row a question, its picture in base64.

    A picture cell may be a list, or the index of the row whose picture it is; without one,
    image_path names a file or a list of them.
    """

    def __init__(self, path: str):
        csv.field_size_limit(sys.maxsize)  # the csv module's, for all: a picture is one cell
        self.path = path
        self.header, spans, self.row_of = cache.cached(["rows"], [path], self._scan)
        self.spans = np.frombuffer(spans, np.int64).reshape(-1, 2)

    def _scan(self) -> list:
        """The header, (offset, size) of each row, and {its index: which row}."""
        offset, spans, row_of = 0, array.array("q"), {}

        def lines(f):
            nonlocal offset
            for line in f:
                offset += len(line)
                yield line.decode(errors="surrogateescape")

        with open(self.path, "rb") as f:
            rows = csv.reader(lines(f), delimiter="\t")
            header = [name.removeprefix("\ufeff") for name in next(rows, [])]
            if "question" not in header:
                raise ValueError(f"its first line names no column question: {str(header)[:200]}")
            column = header.index("index") if "index" in header else -1
            while True:
                start = offset
                try:
                    row = next(rows)
                except StopIteration:
                    return [header, spans.tobytes(), row_of]
                except csv.Error:
                    row = [""]  # told when it is read
                if row:
                    if 0 <= column < len(row):
                        row_of.setdefault(row[column], len(spans) // 2)
                    spans.extend((start, offset - start))

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, i: int) -> dict:
        row = self._row(i)
        cell = row.pop("image", "")
        if 0 < len(cell) <= MAX_REFERENCE and not cell.startswith("["):
            other, cell = cell, ""
            if other in self.row_of:
                cell = self._row(self.row_of[other]).get("image", "")
            if len(cell) <= MAX_REFERENCE:
                raise RecordError(f"its picture is that of row {other!r}, which has none")
        names = row.pop("image_path", "")
        if cell:
            row["images"] = [from_base64(picture) for picture in _listed(cell)]
        elif names:
            row["images"] = _listed(names)
        if "index" in row:
            row["id"] = row["index"]
        return row

    def _row(self, i: int) -> dict:
        """{column: cell}, those that are not empty."""
        text = _utf8(_read(self.path, *self.spans[i].tolist()))
        try:
            (cells,) = csv.reader(io.StringIO(text, newline=""), delimiter="\t")
        except (csv.Error, ValueError) as error:
            raise RecordError(f"not a row of cells: {error}") from None
        if len(cells) != len(self.header):
            raise RecordError(f"{len(cells)} cells, and the header has {len(self.header)}")
        return {name: cell for name, cell in zip(self.header, cells) if cell}


def _listed(cell: str) -> list[str]:
    """A cell that is a Python list, or stands for one thing."""
    if not (cell.startswith("[") and cell.endswith("]")):
        return [cell]
    try:
        values = ast.literal_eval(cell)
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        raise RecordError(f"a cell that is no list: {error}") from None
    if not all(isinstance(value, str) for value in values):
        raise RecordError("a list of other things than text")
    return values


def _read(path: str, offset: int, size: int) -> bytes:
    """Bytes of a file, which has them."""
    with open(path, "rb") as f:
        f.seek(offset)
        data = f.read(size)
    if len(data) != size:
        raise RecordError(f"{path} has become shorter since it was opened")
    return data


def _utf8(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise RecordError(f"not UTF-8: {error}") from None


def _json(data: bytes) -> dict:
    try:
        return _record(json.loads(_utf8(data).removeprefix("\ufeff")))
    except (ValueError, RecursionError) as error:
        if isinstance(error, RecordError):
            raise
        raise RecordError(f"not JSON: {error}") from None


def _record(value) -> dict:
    if not isinstance(value, dict):
        raise RecordError(f"the record is {type(value).__name__}, not an object with keys")
    return value
