"""A run folder as Python objects, for notebooks: steps, results, spectra, histories, grids, predictions.

Reads what the steps saved and nothing else; a run that is unfinished, or still running, opens too and has
what is there so far.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from galdist import status
from hpc import durable

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

    from galdist.statistics.metrics import MetricRow


class RunError(LookupError):
    """A folder that is no run, or something that a run does not have (yet)."""

    def __str__(self) -> str:
        return str(self.args[0])


class Step:
    """One step of a run.

    Attributes
    ----------
    name : str
    path : Path
        its folder, with its results.
    stage : str
        what it runs.
    state : str
        when the step was looked up: ``done``, ``running``, ``failed``, ``stopped``, ``pending``, or ``stale``
        (of another configuration than the run file's).
    """

    def __init__(self, path: Path, stage: str, state: str) -> None:
        self.path, self.stage, self.state = path, stage, state
        self.name = path.name

    def __repr__(self) -> str:
        return f"Step({self.name!r}, stage={self.stage!r}, state={self.state!r})"

    @property
    def config(self) -> dict[str, Any]:
        """The resolved configuration; empty before the step starts."""
        return _read_yaml(self.path / "config.yaml") if self.has("config.yaml") else {}

    @property
    def provenance(self) -> dict[str, Any]:
        """Versions, commit, host, seed, fingerprints, times, peak memory; empty before they are recorded."""
        return dict(_read_json(self.path / "provenance.json")) if self.has("provenance.json") else {}

    @property
    def metrics(self) -> "list[MetricRow]":
        """Rows that the step gave to the table of results."""
        from galdist.statistics import metrics

        return metrics.load_metrics(self.path)

    @property
    def history(self) -> list[dict[str, Any]]:
        """Rows of ``history.jsonl``, one an epoch; a last line that is still being written is left out."""
        path = self.path / "history.jsonl"
        whole = path.read_text(encoding="utf-8").rpartition("\n")[0]
        rows = []
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise RunError(f"{path}, line {number}: not JSON ({error})") from error
        return rows

    def has(self, name: str) -> bool:
        """Whether the step's folder holds a file or folder ``name``."""
        return (self.path / name).exists()


class Run:
    """A run folder. `open_run` makes one.

    Methods that take ``step`` need it only where several steps of the run have such a result.

    Attributes
    ----------
    path : Path
    config : dict
        the resolved run file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = _read_yaml(self.path / "run.yaml")

    @property
    def steps(self) -> dict[str, Step]:
        """The steps by name, as they are now, in the order in which they run."""
        return {
            step.name: Step(self.path / step.name, step.stage, step.state)
            for step in status.steps_of(self.path)
        }

    @property
    def name(self) -> str:
        """Name of the run, as its run file gives it."""
        return str(self.config.get("name", self.path.name))

    def __repr__(self) -> str:
        lines = [f"  {step.name:24} {step.stage:12} {step.state}" for step in self.steps.values()]
        return "\n".join([f"Run {self.name!r} in {self.path}", *lines])

    @property
    def metrics(self) -> "pd.DataFrame":
        """The table of results of finished steps: step, metric, sample, value, error (NaN: unknown), unit."""
        import pandas as pd

        columns = ["step", "metric", "sample", "value", "error", "unit"]
        return pd.DataFrame(status.results(self.path), columns=columns).astype(
            {"value": float, "error": float}
        )

    def history(self, step: str | None = None) -> "pd.DataFrame":
        """What a training step recorded, one row an epoch, indexed by epoch.

        Raises
        ------
        RunError
            where no such step has a history, or several have one and ``step`` does not say which.
        """
        import pandas as pd

        rows = self._step("history.jsonl", "a training history", step).history
        table = pd.DataFrame(rows)
        return table.set_index("epoch") if rows else table

    def spectra(self, step: str | None = None) -> dict[str, Any]:
        """Spectra of a step, as `galdist.statistics.spectra.load_spectra` gives them (NumPy arrays).

        Raises
        ------
        RunError
            as in `history`.
        """
        from galdist.statistics.spectra import load_spectra

        return load_spectra(self._step("spectra.json", "spectra", step).path)

    def grids(self, step: str | None = None) -> "dict[str, xr.Dataset]":
        """Fields of each simulation of a grid store: named dimensions, coordinates, units; read on use.

        Raises
        ------
        RunError
            as in `history`.
        """
        return _datasets(self._step("grids.zarr", "a grid store", step).path / "grids.zarr")

    def predictions(self, step: str | None = None) -> "dict[str, xr.Dataset]":
        """Predicted fields of each simulation, like `grids`, with ``checkpoint`` and ``model`` as attributes.

        Raises
        ------
        RunError
            as in `history`.
        """
        return _datasets(self._step("prediction.zarr", "predictions", step).path / "prediction.zarr")

    def _step(self, file: str, what: str, name: str | None) -> Step:
        """The step ``name``, or the only one, whose folder holds ``file``."""
        steps = self.steps
        holders = [step for step in steps.values() if step.has(file)]
        names = ", ".join(step.name for step in holders) or "none"
        if name is None:
            if len(holders) == 1:
                return holders[0]
            states = ", ".join(f"{step.name} ({step.state})" for step in steps.values())
            if holders:
                raise RunError(f"{self.path}: several steps have {what}: {names}; name one of them")
            raise RunError(f"{self.path}: no step has {what} ({file}) yet; steps: {states}")
        if name not in steps:
            raise RunError(f"{self.path}: no step {name!r}; the run has {', '.join(steps)}")
        step = steps[name]
        if step not in holders:
            raise RunError(
                f"{step.path}: step {name!r} ({step.stage}, {step.state}) has no {file}; "
                f"steps with {what}: {names}"
            )
        return step


def open_run(path: str | Path) -> Run:
    """Open the run in the folder ``path`` (such as ``runs/quickstart``), finished or not.

    Raises
    ------
    RunError
        where there is no run; the message names the runs that are there.
    """
    path = Path(path)
    if (path / status.PLAN).is_file():
        return Run(path)
    if not path.is_dir():
        beside = ", ".join(_runs_in(path.parent)) or "no runs"
        raise RunError(f"{path}: there is no such folder; {path.absolute().parent} holds {beside}")
    if (path.parent / status.PLAN).is_file():
        raise RunError(f"{path}: this is a step; its run is {path.parent}")
    inside = ", ".join(_runs_in(path))
    raise RunError(
        f"{path}: there is no run here (no {status.PLAN})" + (f"; runs in it: {inside}" if inside else "")
    )


def _runs_in(folder: Path) -> Iterator[str]:
    if folder.is_dir():
        yield from sorted(found.parent.name for found in folder.glob(f"*/{status.PLAN}"))


def _datasets(store: Path) -> "dict[str, xr.Dataset]":
    import xarray as xr

    from galdist.grids.store import open_store

    grids = open_store(store)
    about = {key: grids.attrs[key] for key in ("model", "checkpoint") if key in grids.attrs}
    return {name: xr.open_zarr(store, group=name, zarr_format=3).assign_attrs(about) for name in grids}


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise RunError(f"{path}: not YAML ({error})") from error
    if not isinstance(value, dict):
        raise RunError(f"{path}: a mapping was expected, not {type(value).__name__}")
    return value


def _read_json(path: Path) -> Any:
    try:
        return durable.read_json(path)
    except json.JSONDecodeError as error:
        raise RunError(f"{path}: not JSON ({error})") from error
