"""Small grid stores whose galaxies follow the matter, and ranks that train on them."""

import errno
import importlib
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import typing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from moments import Moment, arm

from galdist.grids.store import Field, GridStore, SimulationAttrs, create_store
from hpc import durable, progress
from hpc.ranks import free_port

SPLITS = ("train", "train", "validation", "test")


def make_grids(step: Path, n_mesh: int = 16, splits: Sequence[str] = SPLITS, seed: int = 0) -> GridStore:
    """A step folder with lognormal matter counts and galaxies: Poisson, their mean the density squared.

    The parameters of the simulations do nothing: Omega_m grows by 0.1 from 0.2 on, h is the same in all.
    """
    simulations = [
        SimulationAttrs(
            name=f"box_{n}",
            box_size=25.0,
            redshift=0.0,
            suite="lognormal",
            split=split,
            cosmology={"Omega_m": 0.2 + 0.1 * n, "h": 0.6711},
            astrophysics={"A_SN1": 2.0**n},
        )
        for n, split in enumerate(splits)
    ]
    fields = [
        Field(name="matter_counts", assignment="ngp"),
        Field(name="galaxy_counts", assignment="ngp"),
        Field(name="momentum", units="Msun/h km/s", components=3),
    ]
    store = create_store(step / "grids.zarr", simulations, fields, n_mesh)
    wavenumbers = np.fft.fftfreq(n_mesh) * n_mesh
    k2 = sum(np.meshgrid(*[wavenumbers**2] * 3, indexing="ij"))
    random = np.random.default_rng(seed)
    for simulation in simulations:
        noise = np.fft.fftn(random.normal(size=(n_mesh,) * 3))
        smooth = np.fft.ifftn(noise * np.exp(-k2 / 18)).real
        density = np.exp(1.2 * smooth / smooth.std() - 0.72)
        store[simulation.name].write("matter_counts", random.poisson(4 * density).astype(np.float32))
        store[simulation.name].write("galaxy_counts", random.poisson(0.01 * density**2).astype(np.float32))
        store[simulation.name].write("momentum", random.normal(size=(3, *density.shape)).astype(np.float32))
    return store


CLASSIFIER: dict[str, Any] = {
    "model": {"name": "r2unet-classifier", "channels": [4, 8], "recurrence": 1, "positive_weight": 20},
    "data": {"crop": 8, "crops_per_box": 8, "workers": 0, "tile": 8},
    "epochs": 2,
    "batch_size": 4,
    "seed": 3,
}
"""A training that takes a second."""


@contextmanager
def small_disk(folder: Path, n_bytes: int) -> Iterator[Path]:
    """``folder`` as a disk of its own; the test is skipped where none can be mounted."""
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={n_bytes}", "galdist-test", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(
            f"a disk that is full takes mounting a small one, which fails here: {mounted.stderr.strip()}"
        )
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@contextmanager
def filled(disk: Path) -> Iterator[None]:
    """Inside, the disk has no room for anything."""
    ballast = disk / "ballast"
    with open(ballast, "wb", buffering=0) as stream:
        for size in (1 << 20, 1 << 12):
            try:
                while stream.write(bytes(size)):
                    pass
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
    try:
        yield
    finally:
        ballast.unlink()


_FORKS = multiprocessing.get_context("forkserver")
# To import torch, and what the first optimizer imports, takes longer than most of what a rank is asked to do.
_FORKS.set_forkserver_preload(
    [f"galdist.training.{stage}" for stage in ("train", "predict", "sample")]
    + ["torch._dynamo", "torch.utils.tensorboard"]
)


def _rank(
    stage: str, spec_path: Path, modules: Sequence[str], environment: dict[str, str], log: Path, leader: int
) -> None:
    """What a rank does, in the process group of the rank ``leader``, or its own where that is 0."""
    os.setpgid(0, leader)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)  # OMP_NUM_THREADS has been read before
    logging.basicConfig(level=logging.INFO)
    spec = durable.read_json(spec_path)
    for module in modules:
        importlib.import_module(module)
    function = getattr(importlib.import_module(f"galdist.training.{stage}"), stage)
    inputs = {role: [Path(step) for step in steps] for role, steps in spec["inputs"].items()}
    arm(Path(spec["out"]))
    config = typing.get_type_hints(function)["config"]
    try:
        function(config(**spec["config"]), inputs, Path(spec["out"]))
    except SystemExit as stop:
        sys.stderr.flush()
        os._exit(stop.code)  # at once, as under a launcher


class Ranks:
    """Processes that call a stage together, as a launcher starts them; none is left after a `with`."""

    def __init__(
        self,
        stage: str,
        config: dict[str, Any],
        inputs: dict[str, list[Path]],
        out: Path,
        n_ranks: int = 1,
        modules: Sequence[str] = (),
        at: Moment | None = None,
    ) -> None:
        """``modules`` of the tests are imported first; ``at``: when which of them gets a signal."""
        out.mkdir(parents=True, exist_ok=True)
        spec = out.parent / f"{out.name}-spec.json"
        steps = {role: [str(step) for step in folders] for role, folders in inputs.items()}
        durable.write_json(spec, {"config": config, "inputs": steps, "out": str(out)})
        port = free_port()
        self.log = out.parent / f"{out.name}-log.txt"
        self.progress = out.parent / f"{out.name}-progress.json"
        self.processes: list[multiprocessing.context.ForkServerProcess] = []
        for rank in range(n_ranks):
            environment = os.environ | {
                "PYTHONPATH": os.pathsep.join(map(str, Path(__file__).parents[:2])),
                "OMP_NUM_THREADS": "1",
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(n_ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                progress.VARIABLE: str(self.progress),
                **(at.environment() if at else {}),
            }
            leader = self.processes[0].pid if self.processes else 0
            arguments = (stage, spec, tuple(modules), environment, self.log, leader)
            process = _FORKS.Process(target=_rank, args=arguments)
            process.start()
            self.processes.append(process)
            self._wait_for_its_group(process.pid)

    def _wait_for_its_group(self, pid: int) -> None:
        """Where signals will reach it."""
        with suppress(ProcessLookupError):  # it has ended already
            while os.getpgid(pid) != self.processes[0].pid:
                time.sleep(0.001)

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(ProcessLookupError):
            self.signal_all(signal.SIGKILL)
        for process in self.processes:
            process.join()

    def wait(self, timeout: float = 300) -> list[int]:
        """Exit statuses, in order of rank."""
        for process in self.processes:
            process.join(timeout)
            assert process.exitcode is not None, f"does not end in {timeout:g} s:\n{self.log.read_text()}"
        return [process.exitcode for process in self.processes]

    def succeed(self) -> None:
        """Wait for all ranks to end well."""
        assert self.wait() == [0] * len(self.processes), self.log.read_text()

    def when(self, condition: Callable[[], Any]) -> None:
        """Wait for ``condition``, which must come while all ranks run."""
        deadline = time.monotonic() + 300
        while not condition():
            assert time.monotonic() < deadline, self.log.read_text()
            assert all(process.is_alive() for process in self.processes), self.log.read_text()
            time.sleep(0.002)

    def wait_until_stopped(self) -> None:
        """Wait for the first rank to be stopped by `moments.stopped_at`."""
        first = psutil.Process(self.processes[0].pid)
        self.when(lambda: first.status() == psutil.STATUS_STOPPED)

    def has_workers(self) -> bool:
        """Whether the first rank's data workers have begun to start."""
        children = psutil.Process(self.processes[0].pid).children()
        return any("spawn_main" in " ".join(child.cmdline()) for child in children)

    def signal_all(self, signum: signal.Signals) -> None:
        """Send a signal to every process at once, those of the ranks' own too, as a scheduler does."""
        os.killpg(self.processes[0].pid, signum)
