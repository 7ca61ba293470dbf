"""What a first look at people's files finds, kept in a folder: `$XDG_CACHE_HOME/r4b_jax`, or
`~/.cache/r4b_jax`.

A file of the cache has the stamp of the files it was made from, and is made again when that is
another one. It appears whole or not at all, so processes need not know of each other.
"""

import contextlib
import hashlib
import json
import os
import uuid
import zlib

import msgpack

from r4b_jax.config import ConfigError

VERSION = 1  # of what is kept: higher where files are read in another way


def stamp_of(paths: list[str]) -> list:
    """What differs when a file has changed: (size, time of change in ns) of each."""
    return [[stat.st_size, stat.st_mtime_ns] for stat in map(os.stat, paths)]


def path_of(what: list, ending: str) -> str:
    """Where the cache keeps what is named so."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    key = hashlib.sha256(json.dumps([VERSION, *what]).encode()).hexdigest()[:32]
    return os.path.join(home, "r4b_jax", key + ending)


def cached(what: list, files: list[str], build):
    """`build()`, or what it gave when these files were looked at before. A value of lists, dicts,
    texts and bytes; a damaged file of the cache is as none.

    Args:
      what: names what is kept, beside the files.
    """
    path = path_of([*what, *map(os.path.abspath, files)], ".msgpack")
    stamp = stamp_of(files)
    with contextlib.suppress(OSError, ValueError, msgpack.UnpackException):
        with open(path, "rb") as f:
            check, data = f.read(4), f.read()
        if zlib.crc32(data).to_bytes(4, "big") == check:
            kept, value = msgpack.unpackb(data, unicode_errors="surrogatepass")
            if kept == stamp:
                return value
    value = build()
    data = msgpack.packb([stamp, value], unicode_errors="surrogatepass")
    with replacing(path) as part, open(part, "wb") as f:
        f.write(zlib.crc32(data).to_bytes(4, "big") + data)
    return value


@contextlib.contextmanager
def replacing(path: str):
    """A file to write, which becomes `path` when the block has ended well: processes that do the
    same at the same time do not disturb each other.

    Raises:
      ConfigError: the folder cannot be written to.
    """
    folder, part = os.path.dirname(path) or ".", f"{path}.{uuid.uuid4().hex}.part"
    try:
        os.makedirs(folder, exist_ok=True)
        open(part, "xb").close()
    except OSError as error:
        raise ConfigError(f"cannot write to {folder}: {error}") from None
    try:
        yield part
        os.replace(part, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(part)
