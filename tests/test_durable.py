"""Atomic writes, fingerprints and the room on the disk."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc import durable

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def reordered(value: object) -> object:
    """The same value with the keys of every mapping the other way round."""
    if isinstance(value, dict):
        return {key: reordered(item) for key, item in reversed(value.items())}
    return [reordered(item) for item in value] if isinstance(value, list) else value


@given(json_values)
def test_fingerprint_does_not_depend_on_the_order_of_keys(value: object) -> None:
    assert durable.fingerprint(value) == durable.fingerprint(reordered(value))


@given(st.dictionaries(st.text(), st.integers(), min_size=1), st.data())
def test_fingerprint_sees_every_change(value: dict[str, int], data: st.DataObject) -> None:
    key = data.draw(st.sampled_from(sorted(value)))
    assert durable.fingerprint({**value, key: value[key] + 1}) != durable.fingerprint(value)


def test_fingerprint_is_the_same_in_another_process() -> None:
    """Not Python's hash, which changes from process to process."""
    code = "from hpc import durable; print(durable.fingerprint({'b': [1, 2.5], 'a': 'x'}))"
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    other = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert other.stdout.strip() == durable.fingerprint({"a": "x", "b": [1, 2.5]})


def test_what_killed_writers_left_is_swept(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from hpc import durable\n"
        "with durable.atomic_path(sys.argv[1]) as temporary:\n"
        "    temporary.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    final = tmp_path / "deep" / "weights"
    dead = subprocess.Popen([sys.executable, "-c", code, str(final)])
    dead.wait()
    host = socket.gethostname().partition(".")[0]
    assert len(list(final.parent.iterdir())) == 1, "half a file is there"
    others = [tmp_path / ".notes.tmp", tmp_path / "x.1.tmp", tmp_path / f".live.{host}-{os.getpid()}.tmp"]
    others.append(tmp_path / f".new.elsewhere-{dead.pid}.tmp")
    for other in others:
        other.touch()
    old = tmp_path / ".old.elsewhere-1.tmp"  # there this pid may be anybody's
    old.touch()
    os.utime(old, (0, time.time() - 4000))
    durable.sweep(tmp_path)
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted(others)


def test_a_failed_write_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "model" / "weights"
    durable.write_bytes(path, b"good")

    def fail() -> None:
        with durable.atomic_path(path) as temporary:
            temporary.write_bytes(b"ha")
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        fail()
    assert path.read_bytes() == b"good"
    assert [entry.name for entry in path.parent.iterdir()] == ["weights"], "no temporary file stays"


def test_nan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Out of range"):
        durable.write_json(tmp_path / "a.json", {"value": float("nan")})
    assert not (tmp_path / "a.json").exists()


@given(value=json_values)
def test_json_comes_back(value: object, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("json") / "value.json"
    durable.write_json(path, value, sync=False)
    assert durable.read_json(path) == value


def test_space_is_asked_for_before_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, 10**9))
    durable.require_space(tmp_path / "not" / "there" / "yet", 0.9e9, "the grids")
    with pytest.raises(
        durable.NotEnoughSpace, match=r"the grids needs 2\.00 GB, but only 1\.00 GB are free in"
    ):
        durable.require_space(tmp_path, 2e9, "the grids")
