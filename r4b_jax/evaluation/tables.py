"""VLMEvalKit's tables: the benchmarks' TSV files, and prediction files it can score again.

Cells are what pandas.read_csv makes of them, as VLMEvalKit reads with its defaults: a cell that
reads None, NA, null and the like is missing, also the option "None" of a question; a column that
holds nothing but numbers holds ints, or floats if a cell is missing ("7" is 7.0 then). Nothing is
downloaded.
"""

import ast
import base64
import binascii
import csv
import hashlib
import io
import math
import os
import re
import sys
from collections.abc import Iterator, Sequence

from r4b_jax.config import ConfigError
from r4b_jax.evaluation.scoring.contract import Cell, Row

csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # images are cells
MISSING = frozenset(
    "|#N/A|#N/A N/A|#NA|-1.#IND|-1.#QNAN|-NaN|-nan|1.#IND|1.#QNAN|<NA>|N/A|NA|NULL|NaN|None|n/a"
    "|nan|null".split("|")
)
LONGEST_REFERENCE = 64  # characters; a longer image cell is an image
XLSX_CELL = 32767  # characters of a cell; what is longer loses its end


def folder() -> str:
    """Where VLMEvalKit keeps its files: $LMUData, else ~/LMUData."""
    return os.environ.get("LMUData") or os.path.join(os.path.expanduser("~"), "LMUData")


class Table:
    """A benchmark's rows, with their images where the file has them.

    Attributes:
      rows: the cells without `image`, in the order of the file; rows without an image are left
        out, as VLMEvalKit does. `index` is an int if all are, else a str.
      columns: their names.
      md5: of the file.
    """

    def __init__(self, path: str):
        self.path = path
        self._hash = hashlib.md5()
        header, starts, cells, images = [], [], [], []
        for start, line in self._lines():
            if not header:
                header = line
                cells = [[] for _ in header]
                continue
            if len(line) > len(header):
                raise ConfigError(f"{path}: a row of {len(line)} cells under {len(header)} names")
            line += [""] * (len(header) - len(line))
            image = "x" * 65
            if "image" in header:
                image = line[header.index("image")]
                line[header.index("image")] = ""
                if image in MISSING:
                    continue
            starts.append(start)
            images.append(image if len(image) <= LONGEST_REFERENCE else None)
            for column, cell in zip(cells, line):
                column.append(cell)
        if "index" not in header:
            raise ConfigError(f"{path} has no column `index`: it is no table of VLMEvalKit's")
        self.md5 = self._hash.hexdigest()
        self.columns = [name for name in header if name != "image"]
        typed = {name: typed_column(c) for name, c in zip(header, cells) if name != "image"}
        typed["index"] = _index([_plain(x) for x in typed["index"]])
        self.rows: list[Row] = [
            {name: typed[name][i] for name in self.columns} for i in range(len(starts))
        ]
        self._starts, self._references, self._header = starts, images, header
        self._place = {str(row["index"]): i for i, row in enumerate(self.rows)}

    def _lines(self) -> Iterator[tuple[int, list[str]]]:
        """(byte at which it starts, cells) of each line; hashes the file in passing."""
        position = start = 0

        def decoded(file):
            nonlocal position
            for line in file:
                self._hash.update(line)
                encoding = "utf-8-sig" if position == 0 else "utf-8"
                position += len(line)
                yield line.decode(encoding)

        with open(self.path, "rb") as file:
            try:
                for line in csv.reader(decoded(file), delimiter="\t"):
                    if line:
                        yield start, line
                    start = position
            except (csv.Error, UnicodeDecodeError) as error:
                raise ConfigError(f"{self.path}, after byte {start}: {error}") from error

    def images(self, i: int) -> list[bytes]:
        """The image files of row `i`, in order.

        Raises:
          ConfigError: there is none; the message names file and index.
        """
        row = self.rows[i]
        if "image" not in self._header:
            return [self._file(path) for path in _several(str(row.get("image_path")))]
        if (reference := self._references[i]) is not None:
            place = self._place.get(reference)
            if place is None or self._references[place] is not None:
                raise ConfigError(
                    f"{self.path}: index {row['index']} takes its image from "
                    f"index {reference}, which has none"
                )
            i = place
        with open(self.path, "rb") as file:
            file.seek(self._starts[i])
            lines = (line.decode("utf-8") for line in file)
            cell = next(csv.reader(lines, delimiter="\t"))[self._header.index("image")]
        try:
            return [base64.b64decode(x) for x in _several(cell)]
        except binascii.Error as error:
            raise ConfigError(f"{self.path}: the image of index {row['index']}: {error}") from error

    def _file(self, path: str) -> bytes:
        root = os.path.dirname(self.path)
        name = os.path.basename(self.path).removesuffix(".tsv").removesuffix("_local")
        places = [path, os.path.join(root, "images", name, path), os.path.join(root, path)]
        found = next((place for place in places if os.path.isfile(place)), None)
        if found is None:
            raise ConfigError(f"{self.path}: no image {path}, nor {places[1]}")
        with open(found, "rb") as file:
            return file.read()


def read(names: Sequence[str], md5: str | None, root: str | None = None) -> Table:
    """The table of a benchmark: the first of `names` that is a TSV file in `root` or `folder()`.

    Args:
      md5: of the file; None = any, for tables of one's own.
    Raises:
      ConfigError: it is missing, or is another file; the message names file and md5.
    """
    root = root or folder()
    paths = [os.path.join(root, f"{name}.tsv") for name in names]
    path = next((p for p in paths if os.path.isfile(p)), None)
    if path is None:
        raise ConfigError(
            f"{paths[0]} is missing: VLMEvalKit's table, md5 {md5 or 'any'}. Nothing is "
            "downloaded; put it there, or set $LMUData to the folder that has it"
        )
    table = Table(path)
    if md5 and table.md5 != md5:
        raise ConfigError(
            f"{path} has md5 {table.md5}, not {md5}: it is not the table of this profile, and "
            "its scores would not compare"
        )
    return table


def _plain(cell: Cell) -> str:
    return "nan" if cell is None else str(cell)


def _index(cells: list[str]) -> list[Cell]:
    whole = all(re.fullmatch(r"-?(0|[1-9]\d*)", cell) for cell in cells)
    return [int(cell) for cell in cells] if whole else list(cells)


def _several(cell: str) -> list[str]:
    """A cell with one thing, or with several as a Python list."""
    if len(cell) > 1 and cell[0] == "[" and cell[-1] == "]":
        return [str(x) for x in ast.literal_eval(cell)]
    return [cell]


# Types of a column, as pandas finds them

_INT = re.compile(r"\s*[-+]?\d+\s*", re.ASCII)
_FLOAT = re.compile(
    r"\s*[-+]?(?:(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|inf|infinity)\s*", re.ASCII | re.IGNORECASE
)
_BOOL = {"True": True, "TRUE": True, "true": True, "False": False, "FALSE": False, "false": False}


def typed_column(cells: Sequence[str]) -> list[Cell]:
    """The cells of one column with pandas' type: all ints, all floats, all bools or strings;
    missing ones are None."""
    known = [cell for cell in cells if cell not in MISSING]
    try:
        typed = iter(_typed(known, len(known) < len(cells)))
    except OverflowError:  # a number too large for its type
        typed = iter(known)
    return [None if cell in MISSING else next(typed) for cell in cells]


def _typed(known: list[str], some_missing: bool) -> list[Cell]:
    if all(_INT.fullmatch(cell) for cell in known):
        whole = [int(cell) for cell in known]
        low, high = min(whole, default=0), max(whole, default=0)
        if -(2**63) <= low and high < 2**63:
            return [float(x) for x in whole] if some_missing else whole
        if low < 0 or high >= 2**64 or some_missing:
            raise OverflowError
        return whole
    if all(_FLOAT.fullmatch(cell) for cell in known):
        return [pandas_float(cell) for cell in known]
    if all(cell in _BOOL for cell in known):
        return [_BOOL[cell] for cell in known]
    return known


_DIGITS = 17  # that pandas reads of a float


def pandas_float(cell: str) -> float:
    """The float that pandas reads, whose last digit is not always right: it takes 17 digits as a
    whole number, which a float does not hold, and scales that.

    Raises:
      OverflowError: there is no such float.
    """
    parts = re.fullmatch(r"\s*([-+]?)(\d*)\.?(\d*)(?:[eE]([-+]?\d+))?\s*", cell, re.ASCII)
    if parts is None:
        return float(cell)  # inf
    sign, whole, decimals, exponent = parts.groups()
    decimals = decimals[: max(_DIGITS - len(whole), 0)]
    number = 0.0
    for digit in (whole + decimals)[:_DIGITS]:
        number = number * 10.0 + int(digit)
    scale = int(exponent or 0) + max(len(whole) - _DIGITS, 0) - len(decimals)
    if scale < -308:
        number, scale = number / float(f"1e{min(-308 - scale, 308)}"), -308
    number = number * float(f"1e{scale}") if scale > 0 else number / float(f"1e{-scale}")
    if scale > 308 or math.isinf(number):
        raise OverflowError(cell)
    return -number if sign == "-" else number


# Prediction files


def split_think(raw: str) -> tuple[str, str]:
    """(prediction, thinking) of a raw reply, as VLMEvalKit's SPLIT_THINK has them: the prediction
    is what follows the last `</think>`, or all of it."""
    if "</think>" not in raw:
        return raw, ""
    *thoughts, prediction = raw.split("</think>")
    if len(thoughts) == 1 and "<think>" in thoughts[0]:
        return prediction.strip(), thoughts[0].split("<think>")[1].strip()
    return prediction.strip(), "</think>".join(thoughts) + "</think>"


def seen(reply: str) -> str:
    """One reply, of a model or a judge, as it is seen after a file that also holds other texts."""
    return "nan" if reply in MISSING else reply


def read_back(predictions: Sequence[str], file: str = "tsv") -> list[str]:
    """The predictions of a whole file as VLMEvalKit's evaluators see them after it was written and
    read: "" and "None" become "nan", and in a file of nothing but numbers "007" becomes "7".

    Args:
      file: "tsv" or "xlsx". The latter also cuts what is longer than 32,767 characters and spells
        out control characters.
    """
    if file == "xlsx":
        predictions = [_XLSX_CONTROL.sub(_spelt, x[:XLSX_CELL]) for x in predictions]
    return [_plain(cell) for cell in typed_column(predictions)]


_XLSX_CONTROL = re.compile("[\x00-\x08\x0b-\x1f]")


def _spelt(match: re.Match) -> str:
    return f"_x{ord(match[0]):04X}_"


def write_predictions(path: str, rows: Sequence[Row], predictions: Sequence[str], **more):
    """Write the file that VLMEvalKit's `--mode eval` scores: every column of the table but the
    image, then `prediction` and the columns of `more`. See `prediction_path` for its name."""
    names = [*rows[0], "prediction", *more]
    out = io.StringIO()
    writer = csv.writer(out, delimiter="\t", lineterminator="\n", quoting=csv.QUOTE_ALL)
    writer.writerow(names)
    for i, (row, prediction) in enumerate(zip(rows, predictions)):
        cells = [*row.values(), prediction, *(column[i] for column in more.values())]
        writer.writerow(["" if cell is None else cell for cell in cells])
    with open(path + ".part", "w", encoding="utf-8", errors="replace", newline="") as file:
        file.write(out.getvalue())
    os.replace(path + ".part", path)


def prediction_path(workdir: str, model: str, dataset: str, when: str) -> str:
    """Where `run.py --work-dir WORKDIR --model MODEL --data DATASET --mode eval` looks (with
    PRED_FORMAT=tsv); `when` is a time such as 20250828-120000, and the newest counts."""
    if "/" in model:
        raise ConfigError(f"the model's name becomes a folder's, so it has no slash: {model!r}")
    return os.path.join(workdir, model, f"T{when}", f"{model}_{dataset}.tsv")
