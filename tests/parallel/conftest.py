"""Real MPI ranks for tests: `mpirun(n, function, *args)` calls a function on n ranks.

Run as a script, this file is what every rank executes. To start a rank, with MPI and nbodykit, takes longer
than most of what it is asked to do: ranks stay and are called again.
"""

import gc
import importlib.util
import itertools
import os
import pickle
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from hpc import durable

ROOT = Path(__file__).parents[2]


class World:
    """Ranks of one MPI job, which answer calls until they are told to end."""

    def __init__(self, launcher: Path, size: int, folder: Path) -> None:
        self.size, self.folder = size, folder
        self._calls = 0
        self._bells = []
        for rank in range(size):
            os.mkfifo(folder / f"bell.{rank}")
            self._bells.append(os.open(folder / f"bell.{rank}", os.O_RDWR))  # does not wait for who listens
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "HPC_WORLD_SIZE": str(size),
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        }
        command = [launcher, "-n", str(size), sys.executable, __file__, folder]
        with open(folder / "output", "wb") as output:
            self._process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def call(self, function: Callable[..., Any] | None, args: tuple[Any, ...], timeout: float) -> list[Any]:
        """What each rank's ``function(*args)`` returned; None instead of a function ends the ranks."""
        name = function.__qualname__ if function else "their end"
        what = (function.__code__.co_filename, function.__qualname__, args) if function else None
        durable.write_bytes(self.folder / f"call-{self._calls}", pickle.dumps(what), sync=False)
        results = [self.folder / f"result-{self._calls}.{rank}" for rank in range(self.size)]
        self._calls += 1
        for bell in self._bells:
            os.write(bell, b"!")
        deadline = time.monotonic() + timeout
        while (status := self._process.poll()) is None and not all(path.exists() for path in results):
            if time.monotonic() > deadline:
                self.kill()
                pytest.fail(f"{self.size} ranks did not finish {name} in {timeout:g} s:\n{self.said()}")
            time.sleep(0.002)
        if status is not None and (status or function):
            self.kill()
            pytest.fail(f"{name} failed on {self.size} ranks ({status}):\n{self.said()}")
        return [pickle.loads(path.read_bytes()) for path in results if path.exists()]  # noqa: S301 - by our ranks

    def said(self) -> str:
        """What the ranks printed, some of which is lost when a world ends, and what they raised."""
        raised = sorted(self.folder.glob("error.*"))
        return "".join(path.read_text(errors="replace") for path in (self.folder / "output", *raised))

    def kill(self) -> None:
        """SIGKILL to launcher and ranks, where they have not ended."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        while self._bells:
            os.close(self._bells.pop())


@pytest.fixture(scope="session")
def mpirun(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., list[Any]]]:
    """``mpirun(ranks, function, *args, timeout=300)``: what each rank's ``function(*args)`` returned.

    ``function`` is defined at the top of a file (a test module); every rank imports that file and calls it,
    so it reaches its communicator through `hpc.mpi.world`. A rank that raises fails the test with its
    traceback, and the next call has new ranks.
    """
    launcher = Path(sys.executable).with_name("mpirun")
    if not launcher.exists():
        pytest.skip(f"no mpirun beside {sys.executable}: install the `mpich` package into this environment")
    worlds: dict[int, World] = {}

    def call(ranks: int, function: Callable[..., Any], *args: Any, timeout: float = 300) -> list[Any]:
        if ranks not in worlds:
            worlds[ranks] = World(launcher, ranks, tmp_path_factory.mktemp("mpirun"))
        world = worlds.pop(ranks)
        results = world.call(function, args, timeout)
        worlds[ranks] = world  # which it is not where a rank failed
        return results

    try:
        yield call
        for world in worlds.values():
            world.call(None, (), timeout=60)
    finally:
        for world in worlds.values():
            world.kill()


def _rank(folder: Path) -> None:
    """Answer calls until one says to end, or until the tests are gone."""
    from hpc import mpi

    comm = mpi.world()
    modules: dict[str, ModuleType] = {}
    bell = open(folder / f"bell.{comm.rank}", "rb", buffering=0)  # noqa: SIM115 - as long as the rank
    try:
        for number in itertools.count():
            # nbodykit collects garbage for each mesh, which takes the longer the more objects there are.
            gc.collect()
            gc.freeze()
            if not bell.read(1):
                raise EOFError("the tests have ended without a word")
            what = pickle.loads((folder / f"call-{number}").read_bytes())  # noqa: S301 - by the fixture above
            if what is None:
                return
            file, name, args = what
            if file not in modules:
                modules[file] = _import(file)
            function: Any = modules[file]
            for part in name.split("."):
                function = getattr(function, part)
            result = pickle.dumps(function(*args))
            durable.write_bytes(folder / f"result-{number}.{comm.rank}", result, sync=False)
    except BaseException:  # noqa: BLE001 - the other ranks wait in a collective call: all must end
        text = f"rank {comm.rank} of {comm.size}:\n{traceback.format_exc()}"
        (folder / f"error.{comm.rank}").write_text(text)
        comm.Abort(1)


def _import(file: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    _rank(Path(sys.argv[1]))
