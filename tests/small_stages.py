"""Small stages, one for each runtime, that tests run through the whole pipeline.

Each does real work in pieces that it keeps, so that it can be killed at any moment and continue. As a program
it is the command line of galdist with these stages added: ``python small_stages.py run FILE``.
"""

import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from galdist.config import ExternalPath, StrictModel
from galdist.stages import STAGES as REAL_STAGES
from galdist.stages import Stage
from galdist.statistics.metrics import MetricRow, save_metrics
from hpc import durable, mpi, progress

Inputs = Mapping[str, list[Path]]

HOLD = "SMALL_STAGES_HOLD"
"""Names a file: while that is there, stages wait after their first two pieces, as long as a test needs."""


class PiecesConfig(StrictModel):
    """How many pieces, and how long each takes [s]."""

    seed: int
    n_pieces: int = 4
    seconds: float = 0.0


class EarlierPiecesConfig(StrictModel):
    """As `PiecesConfig` was before it had all of its settings."""

    seed: int
    n_pieces: int = 4


class ReadConfig(StrictModel):
    """A stage that reads a folder no step made."""

    path: ExternalPath
    factor: int = 1


def _piece(config: PiecesConfig, number: int) -> int:
    while number >= 2 and os.path.exists(os.environ.get(HOLD, "")):
        time.sleep(0.02)
    time.sleep(config.seconds)
    return (config.seed * 31 + number) ** 2


def pieces(config: PiecesConfig, inputs: Inputs, out: Path) -> None:
    """One file a piece; the result is their sum and the inputs' results."""
    for number in range(config.n_pieces):
        if not (out / f"piece-{number}.txt").exists():
            durable.write_text(out / f"piece-{number}.txt", str(_piece(config, number)))
        progress.report(number + 1, config.n_pieces, "pieces")
    _conclude(config, inputs, out)


def earlier_pieces(config: EarlierPiecesConfig, inputs: Inputs, out: Path) -> None:
    """`pieces` of an earlier version."""
    pieces(PiecesConfig(**config.model_dump()), inputs, out)


def dask_pieces(config: PiecesConfig, inputs: Inputs, out: Path) -> None:
    """The same by Dask workers."""

    def make(number: int) -> int:
        target = out / f"piece-{number}.txt"
        if not target.exists():
            durable.write_text(target, str(_piece(config, number)))
        return number

    from distributed import as_completed

    from hpc import cluster

    with cluster.client(memory=2**30) as client:
        for done, _ in enumerate(as_completed(client.map(make, range(config.n_pieces))), start=1):
            progress.report(done, config.n_pieces, "pieces")
    _conclude(config, inputs, out)


def ddp_pieces(config: PiecesConfig, inputs: Inputs, out: Path) -> None:
    """The same by DDP ranks in step: each makes its share of a piece, rank 0 keeps the sum."""
    from hpc import ddp

    with ddp.group() as group:
        for number in range(config.n_pieces):
            (missing,) = group.any(not (out / f"piece-{number}.txt").exists())
            if missing:
                shares = group.gather(_share(_piece(config, number), group.rank, group.world_size))
                if group.is_main:
                    durable.write_text(out / f"piece-{number}.txt", str(sum(shares)))
            progress.report(number + 1, config.n_pieces, "pieces")
            group.barrier()
        if group.is_main:
            _conclude(config, inputs, out)


def mpi_pieces(config: PiecesConfig, inputs: Inputs, out: Path) -> None:
    """The same by MPI ranks in step."""
    world = mpi.world()
    for number in range(config.n_pieces):
        if world.allreduce(not (out / f"piece-{number}.txt").exists()):
            total = world.allreduce(_share(_piece(config, number), world.rank, world.size))
            if world.rank == 0:
                durable.write_text(out / f"piece-{number}.txt", str(total))
        progress.report(number + 1, config.n_pieces, "pieces")
        world.barrier()
    if world.rank == 0:
        _conclude(config, inputs, out)


def _share(value: int, rank: int, size: int) -> int:
    return value // size + (value % size if rank == 0 else 0)


def _conclude(config: PiecesConfig, inputs: Inputs, out: Path) -> None:
    total = sum(int((out / f"piece-{number}.txt").read_text()) for number in range(config.n_pieces))
    total += sum(
        int((folder / "result.txt").read_text()) for folders in inputs.values() for folder in folders
    )
    durable.write_text(out / "result.txt", str(total))
    row: MetricRow = {"metric": "total", "sample": "all", "value": float(total), "error": None, "unit": ""}
    save_metrics(out, [row])


def read(config: ReadConfig, inputs: Inputs, out: Path) -> None:
    """Sizes of the files of a folder."""
    sizes = sum(path.stat().st_size for path in config.path.iterdir())
    durable.write_text(out / "result.txt", str(sizes * config.factor))


class FailConfig(StrictModel):
    """How to fail."""

    how: str = "raise"
    rank: int = 0


def fail(config: FailConfig, inputs: Inputs, out: Path) -> None:
    """Fail on one rank, while the others wait for it."""
    rank = int(os.environ.get("RANK", "0"))
    print(f"this is rank {rank}", flush=True)
    if rank == config.rank:
        time.sleep(0.3)
        match config.how:
            case "raise":
                raise ValueError("snapshot.hdf5: PartType1/Coordinates is missing")
            case "exit":
                sys.exit(7)
            case "segfault":
                os.kill(os.getpid(), signal.SIGSEGV)
            case "unraisable":
                os._exit(3)
    time.sleep(60)


STAGES = {
    "pieces": Stage("small_stages:pieces", "serial", ("before*",)),
    "dask": Stage("small_stages:dask_pieces", "dask", ("before*",), ranks=2),
    "ddp": Stage("small_stages:ddp_pieces", "ddp", ("before*",), ranks=2),
    "mpi": Stage("small_stages:mpi_pieces", "mpi", ("before*",), ranks=2),
    "read": Stage("small_stages:read", "serial"),
    "one": Stage("small_stages:pieces", "serial", ("source", "more?")),
    "many": Stage("small_stages:pieces", "serial", ("sources+",)),
    "fail": Stage("small_stages:fail", "serial", ("before*",)),
    "fail-ddp": Stage("small_stages:fail", "ddp", ranks=2),
}


if __name__ == "__main__":
    from galdist.cli import main

    sys.path.append(str(Path(__file__).parent))
    REAL_STAGES.update(STAGES)
    main()
