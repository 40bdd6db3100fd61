"""The stages a run file can name. Strings only: listing them imports nothing heavy.

A stage is one function ``stage(config, inputs, out) -> None``. The annotation of ``config`` is its strict model
(a `galdist.config.StrictModel`), ``inputs`` maps a role to the output folders of the steps named under it, and
``out`` is the folder to fill. Roles end in nothing (exactly one step), ``?`` (none or one), ``+`` (one or more)
or ``*`` (any number).
"""

from dataclasses import dataclass
from typing import Literal

Runtime = Literal["serial", "dask", "ddp", "mpi"]


@dataclass(frozen=True)
class Stage:
    """Where a stage's function is, what starts it and what it reads."""

    function: str
    runtime: Runtime
    reads: tuple[str, ...] = ()
    ranks: int = 1
    """Default number of processes: Dask workers, DDP or MPI ranks."""


STAGES: dict[str, Stage] = {
    "simulate": Stage("galdist.simulations.simulate:simulate", "mpi", ranks=2),
    "ingest": Stage("galdist.grids.ingest:ingest", "dask", ("simulations?",), ranks=2),
    "catalog": Stage("galdist.catalogs.catalog:catalog", "serial", ("simulations?",)),
    "train": Stage("galdist.training.train:train", "ddp", ("grids+", "models*"), ranks=2),
    "predict": Stage("galdist.training.predict:predict", "ddp", ("grids+", "model"), ranks=2),
    "hod": Stage("galdist.statistics.hod:hod", "serial", ("catalogs+", "grids+")),
    "spectra": Stage("galdist.statistics.spectra:spectra", "mpi", ("grids+", "predictions*"), ranks=2),
    "report": Stage("galdist.report.report:report", "serial", ("steps+",)),
}
