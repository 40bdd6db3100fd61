"""Results that are either whole or absent: atomic writes, fingerprints, room on the disk.

A reader never sees half a file: writers fill a temporary name in the same folder, flush it to the disk and
rename it over the final one (`os.replace` is atomic within a file system).
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

_ABANDONED = 3600.0  # seconds


class NotEnoughSpace(OSError):
    """The disk cannot take what is about to be written."""


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str], sync: bool = True) -> Iterator[Path]:
    """A temporary name beside ``path``; renamed onto it when the block ends well, removed when it does not.

    ``sync=False`` leaves out the flush to the disk: for files that matter only while the machine runs.
    """
    final = Path(path)
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.with_name(f".{final.name}.{_host()}-{os.getpid()}.tmp")
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
    """Remove, anywhere under ``folder``, what `atomic_path` left behind in processes that were killed.

    Of processes on other hosts nobody here knows: their files are taken for left behind after an hour.
    """
    for path in Path(folder).rglob(".*.tmp"):
        match = re.fullmatch(r"\..+\.([^.]+)-(\d+)\.tmp", path.name)
        with contextlib.suppress(FileNotFoundError):
            if match is None or path.is_dir():
                continue
            own = match[1] == _host()
            if (
                not psutil.pid_exists(int(match[2]))
                if own
                else time.time() - path.stat().st_mtime > _ABANDONED
            ):
                path.unlink()


def _host() -> str:
    return socket.gethostname().partition(".")[0]


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
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        if error.errno != errno.ESTALE:
            raise
        text = Path(path).read_text(encoding="utf-8")  # it was replaced between our opening and reading it
    return json.loads(text)


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


@contextlib.contextmanager
def room_for(what: str, folder: str | os.PathLike[str]) -> Iterator[None]:
    """Inside, a disk or quota that turns out to be full raises `NotEnoughSpace`.

    Python says neither what was written nor where; the message does: ``what``, into ``folder``.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = shutil.disk_usage(Path(folder).parent).free / 1e6
        raise NotEnoughSpace(
            f"no room for {what} in {folder}: {error.strerror}, {free:.1f} MB are free there"
        ) from error
