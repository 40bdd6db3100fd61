"""Run files: what may stand in them, and every mistake in them at once.

`load` reads a run file (or one of the experiments that ship, by name), applies ``--set`` values, and checks
all of it - structure, stages, their configurations, how the steps fit together - before anything starts.
"""

import heapq
import importlib.resources
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PosixPath
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from galdist.stages import STAGES, Stage
from hpc import strict
from hpc.resources import Resources
from hpc.strict import Location, Problem, SettingsError
from hpc.strict import StrictModel as StrictModel

EVERY_STEP = "*"  # as the value of a role: every step above this one


class ExternalPath(PosixPath):
    """A file or folder that no step made. The pipeline notices when what is there changes.

    In a run file: absolute, or relative to the working directory; ``~`` and variables such as ``$SCRATCH``
    are replaced.
    """

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        text = core_schema.union_schema([core_schema.is_instance_schema(Path), core_schema.str_schema()])
        return core_schema.no_info_after_validator_function(
            cls._resolve, text, serialization=core_schema.to_string_ser_schema()
        )

    @classmethod
    def _resolve(cls, value: str | Path) -> "ExternalPath":
        text = os.path.expanduser(os.path.expandvars(str(value)))
        if "$" in text:
            raise ValueError(f"{value} names an environment variable that is not set")
        return cls(os.path.abspath(text))


def external_paths(value: Any) -> Iterator[ExternalPath]:
    """Every `ExternalPath` in a configuration, however deep."""
    if isinstance(value, ExternalPath):
        yield value
    elif isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from external_paths(getattr(value, name))
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from external_paths(item)
    elif isinstance(value, list | tuple | set | frozenset):
        for item in value:
            yield from external_paths(item)


def _name(text: str) -> str:
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,99}", text):
        raise ValueError(
            f"a name has a-z, 0-9, _ and -, begins with a letter or digit, 100 at most; got {text[:120]!r}"
        )
    return text


Name = Annotated[str, AfterValidator(_name)]
"""Of runs and steps. Names become folders: nothing in them can lead out of the run's folder."""


def _listed(value: object) -> object:
    return [value] if isinstance(value, str) else value


class Step(StrictModel):
    """One step of a run."""

    name: Name
    stage: str
    inputs: dict[str, Annotated[tuple[str, ...], BeforeValidator(_listed)]] = Field(default_factory=dict)
    """Role -> names of the steps whose output is read; ``"*"`` stands for every step above."""
    resources: Resources = Resources()
    expected: Annotated[float, Field(gt=0)] | None = None
    """Rough duration [s], for the estimate of time left in a first run; only the ratios of steps matter."""
    config: dict[str, Any] = Field(default_factory=dict)


class RunFile(StrictModel):
    """A run: a list of steps."""

    name: Name
    description: str = ""
    seed: Annotated[int, Field(ge=0)] = 0
    """Given to every step whose stage takes a ``seed`` and that sets none."""
    steps: Annotated[tuple[Step, ...], Field(min_length=1)]


@dataclass(frozen=True)
class Run:
    """A run file that passed every check."""

    file: RunFile
    """With complete configurations and inputs written out."""
    configs: dict[str, StrictModel]
    """Step name -> its stage's configuration."""
    order: tuple[str, ...]
    """Step names, each after those it reads; otherwise as in the file."""

    @property
    def steps(self) -> dict[str, Step]:
        """The steps by name, in order."""
        by_name = {step.name: step for step in self.file.steps}
        return {name: by_name[name] for name in self.order}

    def to_yaml(self) -> str:
        """The resolved run file."""
        data = self.file.model_dump(mode="json", exclude_defaults=True)
        for step, entry in zip(self.file.steps, data["steps"], strict=True):
            entry["config"] = self.configs[step.name].model_dump(mode="json")
        return yaml.safe_dump({"name": self.file.name, **data}, sort_keys=False, allow_unicode=True)


def experiments() -> dict[str, Path]:
    """Name -> file of the run files that ship."""
    folder = importlib.resources.files("galdist") / "experiments"
    return {
        entry.name.removesuffix(".yaml"): Path(str(entry))
        for entry in sorted(folder.iterdir(), key=lambda entry: entry.name)
        if entry.name.endswith(".yaml")
    }


def load(source: str, overrides: tuple[str, ...] = (), stages: Mapping[str, Stage] = STAGES) -> Run:
    """Read and check a run file.

    Parameters
    ----------
    source:
        A path, or the name of an experiment that ships.
    overrides:
        ``key=value`` each: ``seed=2``, ``grids.n_mesh=128`` (step ``grids``, key of its config),
        ``grids.resources.ranks=1``. Values are YAML.

    Raises
    ------
    hpc.strict.SettingsError
        with everything that is wrong.
    """
    document = strict.read_yaml(_find(source))
    if not isinstance(document.data, dict):
        raise SettingsError(source, [Problem((), "a run file holds keys and values: name, seed, steps")])
    problems = [problem for override in overrides for problem in _apply(override, document)]
    if problems:
        raise SettingsError("--set", problems)
    return _check(document, stages)


def _find(source: str) -> Path:
    if source.endswith((".yaml", ".yml")) or os.sep in source:
        return Path(source)
    known = experiments()
    if source not in known:
        hint = strict.nearest(source, known)
        raise SettingsError(
            source, [Problem((), f"no experiment has this name{hint}. A run file is named with its .yaml")]
        )
    return known[source]


def _apply(override: str, document: strict.Document) -> list[Problem]:
    """Put one ``--set`` value into the run file's data."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        return [Problem((), f"{override!r} is not key=value")]
    try:
        value = strict.parse_yaml(text, key).data
    except SettingsError as error:
        return [Problem((), str(error))]
    parts = key.split(".")
    data = document.data
    if len(parts) == 1:
        if key not in RunFile.model_fields or key == "steps":
            settable = [name for name in RunFile.model_fields if name != "steps"]
            return [Problem((), f"{key}: unknown key{strict.nearest(key, settable)}; of a step: STEP.KEY")]
        data[key] = value
        return []
    parts = parts[1:] if parts[0] == "steps" else parts
    steps = {str(step.get("name")): step for step in data.get("steps") or [] if isinstance(step, dict)}
    if parts[0] not in steps:
        return [Problem((), f"{key}: there is no step {parts[0]!r}{strict.nearest(parts[0], steps)}")]
    own = len(parts) > 1 and parts[1] in Step.model_fields
    return _put(steps[parts[0]], parts[1:] if own else ["config", *parts[1:]], value, key)


def _put(target: Any, parts: list[str], value: Any, key: str) -> list[Problem]:
    for number, part in enumerate(parts):
        last = number == len(parts) - 1
        if isinstance(target, list):
            if not part.isdigit() or int(part) >= len(target):
                return [Problem((), f"{key}: {part} is not an index of a list of {len(target)}")]
            index: Any = int(part)
        elif isinstance(target, dict):
            index = part
            if not last and target.get(part) is None:
                target[part] = {}
        else:
            return [Problem((), f"{key}: {'.'.join(parts[:number])} holds a value, not keys")]
        if last:
            target[index] = value
        else:
            target = target[index]
    return []


def _check(document: strict.Document, stages: Mapping[str, Stage]) -> Run:
    data = document.data
    file, problems = strict.validate(RunFile, data)
    raw = data.get("steps")
    raw = raw if isinstance(raw, list) else []
    seed = file.seed if file else data.get("seed", 0)
    configs: dict[str, StrictModel] = {}
    steps: list[Step] = []
    names: set[str] = set()
    for index, entry in enumerate(raw):
        step, _ = strict.validate(Step, entry)  # what is wrong with its form is among the problems already
        if step is None:
            continue
        steps.append(step)
        at: Location = ("steps", index)
        if step.name in names:
            problems.append(Problem((*at, "name"), f"two steps are called {step.name}"))
        names.add(step.name)
        if step.stage not in stages:
            problems.append(
                Problem((*at, "stage"), f"no stage {step.stage!r}{strict.nearest(step.stage, stages)}")
            )
            continue
        config, wrong = _stage_config(step, stages[step.stage], seed, (*at, "config"))
        problems += wrong
        if config is not None:
            configs[step.name] = config
        if stages[step.stage].runtime == "serial" and (step.resources.ranks or 1) > 1:
            text = f"stage {step.stage} is one process: leave ranks out"
            problems.append(Problem((*at, "resources", "ranks"), text))
    steps = _expand(steps)
    index_of = {str(entry.get("name")): index for index, entry in enumerate(raw) if isinstance(entry, dict)}
    problems += _check_inputs(steps, stages, index_of)
    order, cyclic = _order(steps)
    problems += cyclic
    if problems or file is None:
        raise SettingsError(document.source, *_named(problems, document, raw))
    return Run(file.model_copy(update={"steps": tuple(steps)}), configs, order)


def _stage_config(
    step: Step, stage: Stage, seed: Any, at: Location
) -> tuple[StrictModel | None, list[Problem]]:
    try:
        model = stage.config_model()
    except ImportError as error:
        return None, [Problem(at[:-1], f"stage {step.stage} cannot be loaded: {error}")]
    given = dict(step.config)
    if "seed" in model.model_fields:
        given.setdefault("seed", seed)
    return strict.validate(model, given, at)


def _expand(steps: list[Step]) -> list[Step]:
    above: list[str] = []
    expanded = []
    for step in steps:
        inputs = {
            role: tuple(above) if names == (EVERY_STEP,) else names for role, names in step.inputs.items()
        }
        expanded.append(step.model_copy(update={"inputs": inputs}))
        above.append(step.name)
    return expanded


def _check_inputs(
    steps: list[Step], stages: Mapping[str, Stage], index_of: Mapping[str, int]
) -> list[Problem]:
    problems = []
    for step in steps:
        if step.stage not in stages:
            continue
        roles = stages[step.stage].roles
        at: Location = ("steps", index_of[step.name], "inputs")
        for role, names in step.inputs.items():
            if role not in roles:
                hint = strict.nearest(role, roles) or "; it reads none"
                problems.append(Problem((*at, role), f"stage {step.stage} has no such input{hint}"))
            problems += [
                Problem((*at, role), f"there is no step {name!r}{strict.nearest(name, index_of)}")
                for name in names
                if name not in index_of
            ]
            if len(set(names)) < len(names):
                problems.append(Problem((*at, role), "names a step twice"))
        for role, many in roles.items():
            given = len(step.inputs.get(role, ()))
            if many in ("", "+") and given == 0:
                problems.append(Problem((*at, role), "missing: name the step to read" + "s" * (many == "+")))
            if many in ("", "?") and given > 1:
                problems.append(Problem((*at, role), f"takes one step, got {given}"))
    return problems


def _order(steps: list[Step]) -> tuple[tuple[str, ...], list[Problem]]:
    """Step names, each after its inputs, as near to the file's order as that allows."""
    place = {step.name: number for number, step in enumerate(steps)}
    waits = {s.name: {n for names in s.inputs.values() for n in names if n in place} for s in steps}
    readers: dict[str, list[str]] = {name: [] for name in place}
    for name, needed in waits.items():
        for other in needed:
            readers[other].append(name)
    left = {name: len(needed) for name, needed in waits.items()}
    ready = [place[name] for name, number in left.items() if number == 0]
    heapq.heapify(ready)
    order: dict[str, None] = {}
    while ready:
        name = steps[heapq.heappop(ready)].name
        order[name] = None
        for reader in readers[name]:
            left[reader] -= 1
            if left[reader] == 0:
                heapq.heappush(ready, place[reader])
    stuck = [name for name in place if name not in order]
    if not stuck:
        return tuple(order), []
    return tuple(order), [Problem(("steps",), f"steps wait for one another: {_cycle(stuck, waits)}")]


def _cycle(names: list[str], waits: Mapping[str, set[str]]) -> str:
    """One circle among steps that cannot be ordered, as ``a reads b reads a``."""
    among = set(names)
    path = [names[0]]
    while path[-1] not in path[:-1]:
        path.append(min(waits[path[-1]] & among))
    return " reads ".join(path[path.index(path[-1]) :])


def _named(
    problems: list[Problem], document: strict.Document, raw: list[Any]
) -> tuple[list[Problem], dict[Location, int]]:
    """Problems and lines with steps called by their names instead of their positions."""
    names = {
        index: entry["name"]
        for index, entry in enumerate(raw)
        if isinstance(entry, dict) and re.fullmatch(r"[\w-]+", str(entry.get("name")))
    }

    def rename(location: Location) -> Location:
        if len(location) > 1 and location[0] == "steps" and location[1] in names:
            return ("steps", names[int(location[1])], *location[2:])
        return location

    lines = {rename(location): line for location, line in reversed(document.lines.items())}
    return [Problem(rename(problem.location), problem.message) for problem in problems], lines
