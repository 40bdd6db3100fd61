"""Results that are either whole or absent: atomic writes, fingerprints, room on the disk.

A reader never sees half a file: writers fill a temporary name in the same folder, flush it to the disk and
rename it over the final one (`os.replace` is atomic within a file system).
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil


class NotEnoughSpace(OSError):
    """The disk cannot take what is about to be written."""


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str], sync: bool = True) -> Iterator[Path]:
    """A temporary name beside ``path``; renamed onto it when the block ends well, removed when it does not.

    ``sync=False`` leaves out the flush to the disk: for files that matter only while the machine runs.
    """
    final = Path(path)
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        if sync:
            sync_path(temporary)
        os.replace(temporary, final)
        if sync:
            sync_path(final.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sweep(folder: str | os.PathLike[str]) -> None:
    """Remove, anywhere under ``folder``, what `atomic_path` left behind in processes that were killed."""
    for path in Path(folder).rglob(".*.tmp"):
        match = re.fullmatch(r"\..+\.(\d+)\.tmp", path.name)
        if match and not psutil.pid_exists(int(match[1])) and not path.is_dir():
            path.unlink(missing_ok=True)


def sync_path(path: str | os.PathLike[str]) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: str | os.PathLike[str], data: bytes, sync: bool = True) -> None:
    """Write ``data`` atomically."""
    with atomic_path(path, sync) as temporary:
        temporary.write_bytes(data)


def write_text(path: str | os.PathLike[str], text: str, sync: bool = True) -> None:
    """Write ``text`` (UTF-8) atomically."""
    write_bytes(path, text.encode(), sync)


def write_json(path: str | os.PathLike[str], value: Any, sync: bool = True) -> None:
    """Write ``value`` as JSON, atomically. NaN is refused: JSON has no word for it."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n", sync)


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def fingerprint(value: Any) -> str:
    """Hash of a JSON-like value; equal values give equal fingerprints whatever the order of their keys."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()


def sha256(path: str | os.PathLike[str]) -> str:
    """Checksum of a file."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def folder_size(folder: str | os.PathLike[str]) -> int:
    """Bytes of all files under ``folder``, which need not exist; files that vanish meanwhile do not count."""
    total = 0
    for path in Path(folder).rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size if path.is_file() else 0
    return total


def require_space(folder: str | os.PathLike[str], n_bytes: float, what: str) -> None:
    """Stop before work that will not fit on the disk of ``folder`` (which need not exist yet).

    Raises
    ------
    NotEnoughSpace
        where less than ``n_bytes`` are free; the message names ``what`` needs them and the folder.
    """
    place = Path(folder).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < n_bytes:
        raise NotEnoughSpace(
            f"{what} needs {n_bytes / 1e9:.2f} GB, but only {free / 1e9:.2f} GB are free in {folder}; "
            "make room or choose another output folder"
        )
