"""The stages a run file can name. Strings only: listing them imports nothing heavy.

A stage is one function ``stage(config, inputs, out) -> None``. The annotation of ``config`` is its strict
model (a `galdist.config.StrictModel`), ``inputs`` maps a role to the output folders of the steps named
under it, and ``out`` is the folder to fill. Roles end in nothing (exactly one step), ``?`` (none or one),
``+`` (one or more) or ``*`` (any number).
"""

import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpc import rank

if TYPE_CHECKING:
    from hpc.launch import Runtime
    from hpc.strict import StrictModel


@dataclass(frozen=True)
class Stage:
    """Where a stage's function is, what starts it and what it reads."""

    function: str
    runtime: "Runtime"
    reads: tuple[str, ...] = ()
    ranks: int = 1
    """Default number of processes: Dask workers, DDP or MPI ranks."""

    @property
    def roles(self) -> dict[str, str]:
        """Role -> how many steps it takes: ``""`` (one), ``?``, ``+`` or ``*``."""
        return {role.rstrip("?+*"): role[len(role.rstrip("?+*")) :] for role in self.reads}

    def config_model(self) -> "type[StrictModel]":
        """The model of the stage's configuration. Imports the stage's module."""
        return _config_model(self.function)


STAGES: dict[str, Stage] = {
    "simulate": Stage("galdist.simulations.simulate:simulate", "mpi", ranks=2),
    "ingest": Stage("galdist.grids.ingest:ingest", "dask", ("simulations?", "matter?"), ranks=2),
    "catalog": Stage("galdist.catalogs.catalog:catalog", "serial", ("simulations?",)),
    "centrals": Stage("galdist.catalogs.centrals:centrals", "serial", ("catalogs?",)),
    "smogn": Stage("galdist.catalogs.smogn:smogn", "serial", ("catalogs",)),
    "train": Stage("galdist.training.train:train", "ddp", ("grids*", "catalogs*", "models*"), ranks=2),
    "predict": Stage("galdist.training.predict:predict", "ddp", ("grids+", "model"), ranks=2),
    "sample": Stage("galdist.training.sample:sample", "ddp", ("catalogs+", "models+"), ranks=2),
    "baseline": Stage("galdist.statistics.baselines:baseline", "serial", ("catalogs+",)),
    "hod": Stage("galdist.statistics.hod:hod", "serial", ("catalogs+", "training*", "grids+")),
    "spectra": Stage(
        "galdist.statistics.spectra:spectra", "mpi", ("grids+", "predictions*", "catalogs*"), ranks=2
    ),
    "field-statistics": Stage(
        "galdist.statistics.fields:field_statistics", "mpi", ("grids+", "predictions*"), ranks=2
    ),
    "scores": Stage("galdist.statistics.scores:scores", "serial", ("catalogs+", "predictions+")),
    "tracers": Stage(
        "galdist.statistics.tracer_spectra:tracers", "mpi", ("catalogs+", "predictions+"), ranks=2
    ),
    "report": Stage("galdist.report.report:report", "serial", ("steps+",)),
}


def call(function: str, config: Mapping[str, Any], inputs: Mapping[str, list[str]], out: str) -> None:
    """Call a stage's function with what JSON can carry. This is what runs on every rank of a step's job."""
    rank.load(function)(
        _config_model(function).model_validate(dict(config)),
        {role: [Path(folder) for folder in folders] for role, folders in inputs.items()},
        Path(out),
    )


def _config_model(function: str) -> "type[StrictModel]":
    model = typing.get_type_hints(rank.load(function)).get("config")
    if model is None:
        raise TypeError(f"{function}: its first parameter must be `config`, annotated with its model")
    return typing.cast("type[StrictModel]", model)
