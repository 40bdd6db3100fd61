"""What a run has to do: the fingerprint of every step, and whether its folder holds that result already.

A fingerprint covers the stage, the resolved configuration, what is at external paths, and the names and
fingerprints of the steps that are read. It does not cover resources or the place of external data.
"""

import contextlib
import json
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from galdist.config import ExternalPath, Run, Step, external_paths
from galdist.stages import STAGES, Stage
from hpc import durable, slurm
from hpc.resources import Layout, Resources
from hpc.site import Site
from hpc.strict import Problem, SettingsError, StrictModel, nearest

PROVENANCE, DONE, CONFIG = "provenance.json", "done.json", "config.yaml"
REPLACED = ".replaced"
"""Folder, in the run's, of results that no longer fit."""


@dataclass(frozen=True)
class PlannedStep:
    """A step and what is to be done about it."""

    step: Step
    stage: Stage
    config: StrictModel
    fingerprint: str
    inputs: dict[str, str]
    """Input step -> its fingerprint."""
    external: dict[str, str]
    """External path -> fingerprint of what is there."""
    expected: float | None
    """Seconds it will take, from earlier runs or else the run file."""
    measured: bool
    """Whether ``expected`` comes from an earlier run."""
    runs: bool = True
    why: str = ""
    """For people: why it runs, or why it does not."""
    again: bool = False
    """Computed again although there is a result (``--from``)."""
    asked: bool = True
    """False for a step that ``--only`` leaves out."""

    @property
    def name(self) -> str:
        """The step's name, which is also its folder's."""
        return self.step.name

    @property
    def ranks(self) -> int:
        """Number of processes."""
        return self.step.resources.ranks or self.stage.ranks

    def layout(self, site: Site) -> Layout:
        """How a scheduler lays its processes on nodes; in an allocation, on those that are there.

        Raises
        ------
        hpc.strict.SettingsError
            where they do not fit.
        """
        wanted, runtime = self.step.resources, self.stage.runtime
        if site.launcher != "allocation":
            return wanted.layout(runtime, self.stage.ranks)
        layout = slurm.of_own_job(wanted, runtime).layout(runtime, self.stage.ranks)
        if runtime == "dask":  # its workers are all on the first node
            return replace(layout, nodes=1, min_nodes=1, ranks_per_node=layout.ranks)
        return layout

    def resources(self, site: Site) -> Resources:
        """What it asks for there, with what the run file leaves open written out.

        Raises
        ------
        hpc.strict.SettingsError
            as `layout`.
        """
        wanted = self.step.resources
        if site.launcher not in ("slurm", "allocation"):
            return wanted.model_copy(update={"ranks": self.ranks})
        layout = self.layout(site)
        return wanted.model_copy(
            update={
                "ranks": layout.ranks,
                "nodes": layout.nodes,
                "min_nodes": wanted.min_nodes and layout.min_nodes,
                "cpus": layout.cpus,
                "gpus": layout.gpus,
                "time": wanted.time or site.time,
            }
        )


def plan(
    run: Run,
    out: Path,
    start_from: str | None = None,
    only: Collection[str] | None = None,
    stages: Mapping[str, Stage] = STAGES,
) -> list[PlannedStep]:
    """What `galdist.pipeline.execute` would do, in order. Reads the run's folder and changes nothing.

    Parameters
    ----------
    start_from:
        This step and those that depend on it are computed again. The name of a swept step means all its
        members, here and in ``only``.
    only:
        Names of steps: the others do not run. What they read must be done, or be among them.

    Raises
    ------
    hpc.strict.SettingsError
        for an external path where nothing is, for a step name that does not exist, and where inputs of the
        ``only`` steps are neither done nor among them.
    """
    steps = run.steps
    first = _named("--from", [] if start_from is None else [start_from], run)
    wanted = None if only is None else _named("--only", only, run)
    measured = durations(out)
    planned: dict[str, PlannedStep] = {}
    problems: list[Problem] = []
    missing: dict[str, str] = {}  # neither done nor asked for -> why it would run
    for name, step in steps.items():
        before = read_record(out / name)
        try:
            external = {str(path): _listing(path, before) for path in external_paths(run.configs[name])}
        except FileNotFoundError as error:
            problems.append(Problem(("steps", name, "config"), str(error)))
            continue
        reads = {other for names in step.inputs.values() for other in names}
        if not reads <= planned.keys():
            continue  # of a step with a problem
        entry = _identify(
            step, stages[step.stage], run.configs[name], external, planned, measured.get(name), out, before
        )
        runs, why = _decide(out, entry, before)
        if name in first or any(planned[other].again for other in reads):
            runs, why = True, "asked for with --from" if name in first else f"follows {start_from}"
            entry = replace(entry, again=True)
        asked = wanted is None or name in wanted
        if not asked:
            if runs:
                missing[name] = why
            runs, why = False, "not asked for"
        if runs:
            problems += [
                Problem((name,), f"reads {other}, which is not done ({missing[other]})")
                for other in entry.inputs
                if other in missing
            ]
            problems += [
                Problem(("steps", name, "config"), f"there is nothing at {path}")
                for path in external
                if not Path(path).exists()
            ]
        planned[name] = replace(entry, runs=runs, why=why, asked=asked)
    if problems:
        raise SettingsError(f"run {run.file.name}", problems)
    return list(planned.values())


def _named(option: str, names: Iterable[str], run: Run) -> set[str]:
    """The steps that names on the command line mean."""
    steps = run.steps
    meant: set[str] = set()
    for name in names:
        if name in run.sweeps:
            meant.update(run.sweeps[name].members)
        elif name in steps:
            meant.add(name)
        else:
            hint = nearest(name, [*steps, *run.sweeps])
            raise SettingsError(option, [Problem((), f"there is no step {name!r}{hint}")])
    return meant


def replaced_folder(out: Path, name: str, fingerprint: str) -> Path:
    """Where the result of a step goes that no longer fits; from there it comes back when it fits again."""
    return out / REPLACED / f"{name}-{fingerprint[:8]}"


def read_record(folder: Path) -> dict[str, Any]:
    """A step folder's provenance; empty before there is one."""
    try:
        return dict(durable.read_json(folder / PROVENANCE))
    except FileNotFoundError:
        return {}


def _identify(
    step: Step,
    stage: Stage,
    config: StrictModel,
    external: dict[str, str],
    planned: Mapping[str, PlannedStep],
    measured: float | None,
    out: Path,
    before: Mapping[str, Any],
) -> PlannedStep:
    inputs = {other: planned[other].fingerprint for names in step.inputs.values() for other in names}

    def fingerprint_of(config: Any) -> str:
        roles = {role: [[name, inputs[name]] for name in names] for role, names in step.inputs.items()}
        return durable.fingerprint({"stage": step.stage, "config": config, "inputs": roles})

    plain = _without_places(config, external)
    fingerprint = fingerprint_of(plain)
    if before and before["fingerprint"] != fingerprint:
        # Settings that galdist has learned since, left at their defaults, are as if they were not there.
        as_then = fingerprint_of(_of_then(plain, config, _saved_config(out / step.name)))
        fingerprint = as_then if as_then == before["fingerprint"] else fingerprint
    expected = measured if measured is not None else step.expected
    return PlannedStep(step, stage, config, fingerprint, inputs, external, expected, measured is not None)


def _decide(out: Path, entry: PlannedStep, before: dict[str, Any]) -> tuple[bool, str]:
    """Whether the step runs, and why."""
    if before.get("fingerprint") == entry.fingerprint:
        if (out / entry.name / DONE).exists():
            return False, "done"
        return True, "failed before" if before["error"] else "continues"
    kept = replaced_folder(out, entry.name, entry.fingerprint)
    if read_record(kept).get("fingerprint") == entry.fingerprint:
        return (
            (False, "done before; moved back") if (kept / DONE).exists() else (True, "continues; moved back")
        )
    if not before:
        return True, "new"
    changes = _changes(out / entry.name, entry, before)
    return True, "; ".join(changes[:3]) + (f"; {len(changes) - 3} more" if len(changes) > 3 else "")


def _changes(folder: Path, entry: PlannedStep, before: dict[str, Any]) -> list[str]:
    """What is not as it was when ``folder`` was filled."""
    if before["stage"] != entry.step.stage:
        return [f"stage changed: {before['stage']} -> {entry.step.stage}"]
    config = _saved_config(folder)
    now = _of_then(entry.config.model_dump(mode="json"), entry.config, config)
    old, new = before["inputs"], entry.inputs
    return [
        *(f"config changed: {text}" for text in _differences(config, now)),
        *(
            f"{path} changed"
            for path, listing in entry.external.items()
            if before["external"].get(path, listing) != listing
        ),
        *(f"input {name} changed" for name in new if name in old and old[name] != new[name]),
        *(f"input {name} added" for name in new if name not in old),
        *(f"input {name} removed" for name in old if name not in new),
    ]


def _saved_config(folder: Path) -> dict[str, Any]:
    """The configuration that a step folder was filled with; empty before there is one."""
    return dict(yaml.safe_load((folder / CONFIG).read_text())) if (folder / CONFIG).exists() else {}


def _of_then(plain: Any, value: Any, saved: Any) -> Any:
    """``plain``, the data of ``value``, without what ``saved`` lacks and is at its default."""
    if isinstance(value, BaseModel) and isinstance(saved, dict):
        fields = type(value).model_fields
        return {
            name: _of_then(plain[name], getattr(value, name), saved.get(name))
            for name, field in fields.items()
            if name in saved or getattr(value, name) != field.get_default(call_default_factory=True)
        }
    if isinstance(value, Mapping) and isinstance(saved, dict):
        return {key: _of_then(plain[key], item, saved.get(key)) for key, item in value.items()}
    if isinstance(value, list | tuple) and isinstance(saved, list) and len(value) == len(saved):
        return [_of_then(*items) for items in zip(plain, value, saved, strict=True)]
    return plain


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(key for key in new if key not in old)]
        return [
            text
            for key in keys
            if old.get(key) != new.get(key)
            for text in _differences(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
        ]
    return [f"{path}: {_short(old)} -> {_short(new)}"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text.strip('"') if len(text) <= 40 else text[:37] + "..."


def _listing(path: ExternalPath, before: Mapping[str, Any]) -> str:
    """Fingerprint of names, sizes and times of the files at ``path``.

    Where the data is gone but a finished step remembers it, what it remembers: raw data may be deleted once
    used.
    """
    if not path.exists():
        known = before.get("external", {}).get(str(path))
        if known is None or before.get("finished") is None:
            raise FileNotFoundError(f"there is nothing at {path}")
        return str(known)
    entries = []
    seen: set[str] = set()
    for folder, folders, names in os.walk(path, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        for name in names:
            file = Path(folder, name)
            with contextlib.suppress(FileNotFoundError):  # a link to nowhere
                facts = file.stat()
                entries.append([str(file.relative_to(path)), facts.st_size, facts.st_mtime_ns])
    if path.is_file():
        facts = path.stat()
        entries.append([path.name, facts.st_size, facts.st_mtime_ns])
    return durable.fingerprint(sorted(entries))


def _without_places(value: Any, external: Mapping[str, str]) -> Any:
    """The configuration as plain data, paths replaced by what is there: moved data is the same data."""
    if isinstance(value, ExternalPath):
        return {"external": external.get(str(value))}
    if isinstance(value, BaseModel):
        return {name: _without_places(getattr(value, name), external) for name in type(value).model_fields}
    if isinstance(value, Mapping):
        return {str(key): _without_places(item, external) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted((_without_places(item, external) for item in value), key=str)
    if isinstance(value, list | tuple):
        return [_without_places(item, external) for item in value]
    return to_jsonable_python(value)


def durations(out: Path) -> dict[str, float]:
    """Step -> seconds that it took the last time, whatever its configuration was."""
    found: dict[str, tuple[str, float]] = {}
    for path in [*out.glob(f"*/{PROVENANCE}"), *out.glob(f"{REPLACED}/*/{PROVENANCE}")]:
        entry = read_record(path.parent)
        if entry.get("finished") and found.get(entry["step"], ("",))[0] < entry["finished"]:
            found[entry["step"]] = (entry["finished"], float(entry["seconds"]))
    return {name: seconds for name, (_, seconds) in found.items()}
