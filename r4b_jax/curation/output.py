"""What curation writes as it goes: samples.jsonl, decisions.jsonl, the pictures, and how far all of
it is whole.

Both files only grow, block by block. When a block is on the disk, the journal gets a line with
their lengths, so a run that was killed cuts off what came after the last such line and goes on from
there: its files become those of a run that was not.
"""

import hashlib
import io
import json
import os
from collections.abc import Iterator

import PIL.Image

from r4b_jax.common import processes
from r4b_jax.data.records import to_record
from r4b_jax.data.samples import Sample

FILES = ("decisions.jsonl", "samples.jsonl")


class Output:
    """The growing files in `folder`. The first process cuts off and appends, the others read.

    Attributes:
      queries: how many are decided.
      counters: of who answers, as the last `append` had them.
    """

    def __init__(self, folder: str):
        self.folder, self.queries, self.counters = folder, 0, {}
        self.journal = os.path.join(folder, "journal.jsonl")
        whole = self._last_whole()
        if whole is not None:
            self.queries, self.counters = whole["queries"], whole["counters"]
        if processes.is_first():
            os.makedirs(folder, exist_ok=True)
            for name in FILES:
                with open(os.path.join(folder, name), "ab") as f:
                    f.truncate(whole[name] if whole else 0)

    def _last_whole(self) -> dict | None:
        """The last line of the journal that the files bear out."""
        found, end = None, 0
        if os.path.exists(self.journal):
            with open(self.journal, "rb") as f:
                for line in f:
                    if not line.endswith(b"\n") or not self._borne_out(json.loads(line)):
                        break
                    found, end = json.loads(line), end + len(line)
            if processes.is_first():
                os.truncate(self.journal, end)
        return found

    def _borne_out(self, entry: dict) -> bool:
        paths = {name: os.path.join(self.folder, name) for name in FILES}
        return all(
            os.path.exists(path) and os.path.getsize(path) >= entry[name]
            for name, path in paths.items()
        )

    def append(self, decisions: list[dict], samples: list[Sample], counters: dict):
        """Write one block's decisions and its decided samples."""
        self.queries, self.counters = self.queries + len(decisions), counters
        if not processes.is_first():
            return
        entry = {"queries": self.queries, "counters": counters}
        records = [self._record(sample) for sample in samples]
        for name, lines in zip(FILES, (decisions, records)):
            entry[name] = _append(os.path.join(self.folder, name), lines)
        _append(self.journal, [entry])

    def read(self) -> Iterator[tuple[dict, dict | None]]:
        """Every decision so far, with the record that was written for it, or None."""
        decisions, samples = (
            open(os.path.join(self.folder, name), encoding="utf-8") for name in FILES
        )
        with decisions, samples:
            for line in decisions:
                decision = json.loads(line)
                aside = decision["decision"] == "set aside"
                yield decision, None if aside else json.loads(next(samples))

    def _record(self, sample: Sample) -> dict:
        """A sample as `messages` with typed parts, its pictures as files that `images` names:
        those that are files stay where they are."""
        record, names = to_record(sample), []
        shown = [part for part in _parts(record) if part["type"] == "image"]
        for part, image in zip(shown, sample.images, strict=True):
            data = part.pop("image")
            if isinstance(image, (str, os.PathLike)):
                names.append(os.path.abspath(image))
            else:
                names.append(self._keep(data))
        return record | {"images": names} if names else record

    def _keep(self, data: bytes) -> str:
        """Write a picture once, under the hash of its bytes; its name in the folder."""
        digest = hashlib.sha1(data).hexdigest()
        with PIL.Image.open(io.BytesIO(data)) as picture:
            ending = {"JPEG": "jpg"}.get(picture.format, picture.format.lower())
        name = f"images/{digest[:2]}/{digest}.{ending}"
        path = os.path.join(self.folder, name)
        if not os.path.exists(path):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path + ".part", "wb") as f:
                f.write(data)
            os.replace(path + ".part", path)  # there only when whole
        return name


def _parts(record: dict) -> list[dict]:
    """The typed parts of all questions of a record, in order."""
    return [p for m in record["messages"] if m["role"] == "user" for p in m["content"]]


def _append(path: str, lines: list[dict]) -> int:
    """Append JSON lines, on the disk when this returns; the file's length then."""
    with open(path, "ab") as f:
        f.writelines(json.dumps(line).encode() + b"\n" for line in lines)
        f.flush()
        os.fsync(f.fileno())
        return f.tell()
