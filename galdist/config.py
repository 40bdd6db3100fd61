"""Run files: what may stand in them, and every mistake in them at once.

`load` reads a run file (or one of the experiments that ship, by name), applies ``--set`` values, and checks
all of it - structure, stages, their configurations, how the steps fit together - before anything starts.
"""

import copy
import heapq
import importlib.resources
import itertools
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path, PosixPath
from typing import Annotated, Any, Protocol, runtime_checkable

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from galdist.stages import STAGES, Stage
from hpc import strict
from hpc.resources import Resources
from hpc.strict import Location, Problem, SettingsError
from hpc.strict import StrictModel as StrictModel

EVERY_STEP = "*"  # as the value of a role: every step above this one
MEMBERS = 10_000
"""Most members of one sweep."""
_NAME = 100  # letters of a name at most
_DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # the first is ten times faster


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


@runtime_checkable
class ChecksInputs(Protocol):
    """A stage's configuration that decides which of the stage's roles a step must have, and with what."""

    def check_inputs(self, inputs: Mapping[str, Mapping[str, StrictModel | None]]) -> None:
        """Raise ValueError where a step with this configuration cannot read ``inputs``: role -> name of the
        step -> its configuration, None where that has mistakes of its own."""


@runtime_checkable
class Leaves(Protocol):
    """A stage's configuration that tells which columns or fields its step leaves."""

    def require(self, names: Sequence[str], step: str) -> None:
        """Raise ValueError for one that ``step``, with this configuration, is sure not to leave."""


def require(names: Sequence[str], steps: Mapping[str, StrictModel | None]) -> None:
    """Refuse columns or fields before they are made, by what is known of the ``steps`` that will make them,
    name -> configuration. What they leave is not known of all stages before they run.

    Raises
    ------
    ValueError
        for a name that one of them will lack; the message has the nearest.
    """
    for step, config in steps.items():
        if isinstance(config, Leaves):
            config.require(names, step)


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


def _sweep(value: object) -> object:
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, Mapping) or not value:
        raise ValueError(
            f"expected KEY: [values], such as {{seed: [1, 2, 3]}}, or the name of a swept step, got {value!r}"
        )
    for key, values in value.items():
        if not isinstance(values, list | tuple) or not values:
            raise ValueError(f"{key}: expected a list of one or more values, got {values!r}")
        for item in values:
            parts = item if isinstance(item, list | tuple) else [item]
            if any(isinstance(part, Mapping | list | tuple) for part in parts):
                raise ValueError(f"{key}: a swept value is a number, a word or a list of them, got {item!r}")
    return {str(key): tuple(values) for key, values in value.items()}


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
    sweep: Annotated[dict[str, tuple[Any, ...]] | str | None, BeforeValidator(_sweep)] = None
    """Keys of the configuration and their values: the step is done once for each combination. Or the name of
    a swept step: once for each of its members, reading that member's own results."""
    at_once: Annotated[int, Field(ge=1)] | None = None
    """Most jobs of the sweep that run at the same time."""


class RunFile(StrictModel):
    """A run: a list of steps."""

    name: Name
    description: str = ""
    seed: Annotated[int, Field(ge=0)] = 0
    """Given to every step whose stage takes a ``seed`` and that sets none."""
    steps: Annotated[tuple[Step, ...], Field(min_length=1)]


@dataclass(frozen=True)
class Sweep:
    """What a swept step stands for."""

    members: tuple[str, ...]
    """Names of steps, which are steps like any other."""
    at_once: int | None
    """Most of them that run at the same time."""


@dataclass(frozen=True)
class Run:
    """A run file that passed every check."""

    file: RunFile
    """With complete configurations, inputs written out and swept steps replaced by their members."""
    configs: dict[str, StrictModel]
    """Step name -> its stage's configuration."""
    order: tuple[str, ...]
    """Step names, each after those it reads; otherwise as in the file."""
    sweeps: dict[str, Sweep] = field(default_factory=dict)
    """By the name of the swept step."""

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
        data = {"name": self.file.name, **data}
        return str(yaml.dump(data, Dumper=_DUMPER, sort_keys=False, allow_unicode=True))


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


@dataclass(frozen=True)
class _Member:
    """What tells one step of a sweep from the others; a step that is not swept has one, without a suffix."""

    suffix: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)
    """Swept key -> value."""


@dataclass
class _Declared:
    """A step as it stands in the file, and the steps that come of it."""

    step: Step
    at: Location
    root: str | None = None
    """The step whose keys are swept, which may be this one."""
    members: tuple[_Member, ...] = (_Member(),)

    @property
    def names(self) -> list[str]:
        """Names of the steps that come of it."""
        return [self.step.name + member.suffix for member in self.members]


def _check(document: strict.Document, stages: Mapping[str, Stage]) -> Run:
    data = document.data
    file, problems = strict.validate(RunFile, data)
    raw = data.get("steps")
    raw = raw if isinstance(raw, list) else []
    seed = file.seed if file else data.get("seed", 0)
    declared: list[_Declared] = []
    for index, entry in enumerate(raw):
        step, _ = strict.validate(Step, entry)  # what is wrong with its form is among the problems already
        if step is not None:
            above = tuple(other.step.name for other in declared)
            inputs = {role: above if names == (EVERY_STEP,) else names for role, names in step.inputs.items()}
            declared.append(_Declared(step.model_copy(update={"inputs": inputs}), ("steps", index)))
    by_name = {entry.step.name: entry for entry in declared}
    known = {str(entry.get("name")) for entry in raw if isinstance(entry, dict)}  # also where more is wrong
    problems += _find_members(declared, by_name, known)
    known |= {name for entry in declared for name in entry.names}
    steps: list[Step] = []
    configs: dict[str, StrictModel] = {}
    places: dict[str, Location] = {}
    for entry in declared:
        stage = stages.get(entry.step.stage)
        if stage is None:
            text = f"no stage {entry.step.stage!r}{strict.nearest(entry.step.stage, stages)}"
            problems.append(Problem((*entry.at, "stage"), text))
        made = [_make(entry, member, by_name) for member in entry.members]
        steps += made
        if stage is None:
            continue
        if stage.runtime == "serial" and (entry.step.resources.ranks or 1) > 1:
            text = f"stage {entry.step.stage} is one process: leave ranks out"
            problems.append(Problem((*entry.at, "resources", "ranks"), text))
        for step, member in zip(made, entry.members, strict=True):
            config, wrong = _stage_config(entry, member, step, stage, seed)
            problems += wrong
            if config is not None:
                configs[step.name] = config
                places[step.name] = entry.at
        problems += _check_inputs(entry, made[:1], stage, by_name, known)
    problems += [
        problem
        for step in steps
        if step.name in configs
        for problem in _check_choice(step, places[step.name], configs)
    ]
    order, cyclic = _order(steps)
    problems += cyclic
    if problems or file is None:
        raise SettingsError(document.source, *_named(list(dict.fromkeys(problems)), document, raw))
    sweeps = {
        entry.step.name: Sweep(tuple(entry.names), entry.step.at_once) for entry in declared if entry.root
    }
    return Run(file.model_copy(update={"steps": tuple(steps)}), configs, order, sweeps)


def _find_members(
    declared: list[_Declared], by_name: Mapping[str, _Declared], known: Set[str]
) -> list[Problem]:
    """Fill in the members of every swept step; returns what is wrong with sweeps and names."""
    problems = []
    for entry in declared:
        step, at = entry.step, (*entry.at, "sweep")
        if isinstance(step.sweep, dict):
            entry.root = step.name
            number = math.prod(len(values) for values in step.sweep.values())
            if number > MEMBERS:
                problems.append(Problem(at, f"makes {number} steps of one, {MEMBERS} at most"))
            entry.members = tuple(_product(step.sweep)) if number <= MEMBERS else ()
        elif step.sweep is None and step.at_once is not None:
            problems.append(Problem((*entry.at, "at_once"), "is for steps with a sweep, and here is none"))
    for entry in declared:
        if isinstance(entry.step.sweep, str):
            found = _root(entry.step, by_name, known)
            if isinstance(found, str):
                problems += [Problem((*entry.at, "sweep"), found)] * bool(found)
                entry.members = ()
            else:
                entry.root, entry.members = found.step.name, found.members
    taken: set[str] = set()
    for entry in declared:
        name = entry.step.name
        if name in taken:
            problems.append(Problem((*entry.at, "name"), f"two steps are called {name}"))
        taken.add(name)
        for made in entry.names if entry.root else ():
            if made in taken:
                problems.append(Problem((*entry.at, "sweep"), f"makes a second step called {made}"))
            elif len(made) > _NAME:
                text = f"makes a step called {made}: {_NAME} letters at most"
                problems.append(Problem((*entry.at, "sweep"), text))
            taken.add(made)
    return problems


def _product(sweep: Mapping[str, tuple[Any, ...]]) -> Iterator[_Member]:
    """Every combination, the last key fastest. A key is called by its last part where that is enough."""
    last = [key.rpartition(".")[2] for key in sweep]
    labels = [short if last.count(short) == 1 else key for key, short in zip(sweep, last, strict=True)]
    for values in itertools.product(*sweep.values()):
        parts = [label + _in_name(value) for label, value in zip(labels, values, strict=True)]
        suffix = "".join(f"-{re.sub('[^a-z0-9_-]', '_', part.lower())}" for part in parts)
        yield _Member(suffix, dict(zip(sweep, values, strict=True)))


def _in_name(value: Any) -> str:
    return "-".join(map(_in_name, value)) if isinstance(value, list | tuple) else str(value)


def _root(step: Step, by_name: Mapping[str, _Declared], known: Set[str]) -> _Declared | str:
    """The step whose keys are swept where ``step`` names another as its sweep; else what is wrong with that.

    Nothing is said of a step about which something else is said already.
    """
    passed: list[str] = []
    while isinstance(step.sweep, str):
        passed.append(step.name)
        if step.sweep in passed:
            return f"no keys are swept: {' follows '.join([*passed, step.sweep])}"
        if step.sweep not in by_name:
            hint = strict.nearest(step.sweep, known)
            return "" if step.sweep in known else f"there is no step {step.sweep!r}{hint}"
        step = by_name[step.sweep].step
    if step.sweep is None:
        return f"{step.name} is not swept: give it `sweep: {{KEY: [values]}}`, or leave sweep out here"
    return by_name[step.name]


def _make(entry: _Declared, member: _Member, by_name: Mapping[str, _Declared]) -> Step:
    """The step of one member: of what has the same members it reads its own, of other sweeps all."""

    def read(name: str) -> list[str]:
        other = by_name.get(name)
        if other is None or other.root is None:
            return [name]
        return [name + member.suffix] if other.root == entry.root else other.names

    inputs = {
        role: tuple(made for name in names for made in read(name))
        for role, names in entry.step.inputs.items()
    }
    name = entry.step.name + member.suffix
    return entry.step.model_copy(update={"name": name, "inputs": inputs, "sweep": None, "at_once": None})


def _stage_config(
    entry: _Declared, member: _Member, step: Step, stage: Stage, seed: Any
) -> tuple[StrictModel | None, list[Problem]]:
    """The configuration of a step; what is wrong with a swept value is located in the sweep."""
    try:
        model = stage.config_model()
    except ImportError as error:
        return None, [Problem(entry.at, f"stage {step.stage} cannot be loaded: {error}")]
    swept = member.values if entry.root == entry.step.name else {}
    given = copy.deepcopy(step.config) if swept else dict(step.config)
    problems = []
    for key, value in swept.items():
        at = (*entry.at, "sweep", key)
        if _holds(given, key.split(".")):
            problems.append(Problem(at, "is set in config too: leave it out of one of them"))
        else:
            wrong = _put(given, key.split("."), value, key)
            problems += [Problem(at, problem.message) for problem in wrong]
    if problems:
        return None, problems
    if "seed" in model.model_fields:
        given.setdefault("seed", member.values.get("seed", seed))
    config, wrong = strict.validate(model, given, (*entry.at, "config"))
    return config, [_in_sweep(problem, entry.at, swept) for problem in wrong]


def _holds(data: Any, parts: list[str]) -> bool:
    for part in parts:
        if not isinstance(data, dict) or part not in data:
            return False
        data = data[part]
    return True


def _in_sweep(problem: Problem, at: Location, swept: Iterable[str]) -> Problem:
    path = ".".join(map(str, problem.location[len(at) + 1 :]))
    for key in swept:
        if f"{path}.".startswith(f"{key}.") or key.startswith(f"{path}."):
            return Problem((*at, "sweep", key), problem.message)
    return problem


def _check_inputs(
    entry: _Declared, made: list[Step], stage: Stage, by_name: Mapping[str, _Declared], known: Set[str]
) -> list[Problem]:
    """What is wrong with what a step reads, judged by its first member: the others read as many."""
    problems = []
    at: Location = (*entry.at, "inputs")
    for role, names in entry.step.inputs.items():
        if role not in stage.roles:
            hint = strict.nearest(role, stage.roles) or "; it reads none"
            problems.append(Problem((*at, role), f"stage {entry.step.stage} has no such input{hint}"))
        problems += [
            Problem((*at, role), f"there is no step {name!r}{strict.nearest(name, known)}")
            for name in names
            if name not in known
        ]
        if len(set(names)) < len(names):
            problems.append(Problem((*at, role), "names a step twice"))
    for role, many in stage.roles.items():
        names = entry.step.inputs.get(role, ())
        given = sum(len(step.inputs.get(role, ())) for step in made)
        if many in ("", "+") and not names:
            problems.append(Problem((*at, role), "missing: name the step to read" + "s" * (many == "+")))
        if many in ("", "?") and given > 1:
            swept = next((name for name in names if name in by_name and by_name[name].root), None)
            hint = f"; with `sweep: {swept}` this step is done for each member of {swept}" if swept else ""
            problems.append(Problem((*at, role), f"takes one step, got {given}{hint}"))
    return problems


def _check_choice(step: Step, at: Location, configs: Mapping[str, StrictModel]) -> list[Problem]:
    """What a configuration has against the inputs of its step."""
    config = configs[step.name]
    if isinstance(config, ChecksInputs):
        try:
            config.check_inputs(
                {role: {name: configs.get(name) for name in names} for role, names in step.inputs.items()}
            )
        except ValueError as error:
            return [Problem((*at, "inputs"), str(error))]
    return []


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
