"""Real MPI ranks for tests: `mpirun(n, function, *args)` calls a function on n ranks.

Run as a script, this file is what every rank executes.
"""

import importlib.util
import os
import pickle
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def mpirun(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[Any]]:
    """``mpirun(ranks, function, *args, timeout=120, env={})``: what each rank's ``function(*args)`` returned.

    ``function`` is defined at the top of a file (a test module); every rank imports that file and calls it,
    so it reaches its communicator through `hpc.mpi.world`. A rank that raises fails the test with its
    traceback.
    """
    launcher = Path(sys.executable).with_name("mpirun")
    if not launcher.exists():
        pytest.skip(f"no mpirun beside {sys.executable}: install the `mpich` package into this environment")

    def start(
        ranks: int,
        function: Callable[..., Any],
        *args: Any,
        timeout: float = 120,
        env: dict[str, str] | None = None,
    ) -> list[Any]:
        folder = tmp_path_factory.mktemp("mpirun")
        call, result = folder / "call", folder / "result"
        call.write_bytes(pickle.dumps((function.__code__.co_filename, function.__qualname__, args)))
        command = [str(launcher), "-n", str(ranks), sys.executable, __file__, str(call), str(result)]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "HPC_WORLD_SIZE": str(ranks),
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
            **(env or {}),
        }
        process = subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            pytest.fail(f"{ranks} ranks did not finish {function.__qualname__} in {timeout:g} s:\n{output}")
        if process.returncode != 0:
            output += "".join(path.read_text() for path in sorted(folder.glob("result.error.*")))
            pytest.fail(f"{function.__qualname__} failed on {ranks} ranks ({process.returncode}):\n{output}")
        results: list[Any] = pickle.loads(result.read_bytes())  # noqa: S301 - written by the ranks above
        assert len(results) == ranks
        return results

    return start


def _rank(call: str, result: str) -> None:
    from hpc import mpi

    comm = mpi.world()
    try:
        file, name, args = pickle.loads(Path(call).read_bytes())  # noqa: S301 - written by the fixture above
        spec = importlib.util.spec_from_file_location(Path(file).stem, file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        function = module
        for part in name.split("."):
            function = getattr(function, part)
        results = comm.gather(function(*args))  # type: ignore[operator]
        if comm.rank == 0:
            Path(result).write_bytes(pickle.dumps(results))
    except BaseException:  # noqa: BLE001 - the other ranks wait in a collective call: all must end
        text = f"rank {comm.rank} of {comm.size}:\n{traceback.format_exc()}"
        Path(f"{result}.error.{comm.rank}").write_text(text)  # what is printed may be lost when the world ends
        comm.Abort(1)


if __name__ == "__main__":
    _rank(*sys.argv[1:])
