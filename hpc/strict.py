"""Strict settings from YAML: what is wrong is found before work starts, all of it at once, and told in words.

`read_yaml` keeps the line of every key, `validate` turns a model's complaints into `Problem`s, and
`SettingsError` prints them with file, line and path.
"""

import difflib
import re
import types
import typing
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

Location = tuple[str | int, ...]


class StrictModel(BaseModel):
    """Base of every configuration: unknown keys are errors, values do not change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, and where."""

    location: Location
    message: str


class SettingsError(ValueError):
    """Wrong input. ``str()`` lists every problem, one a line, with its line in the file and its path."""

    def __init__(
        self, source: str, problems: Iterable[Problem], lines: Mapping[Location, int] | None = None
    ) -> None:
        self.source = source
        self.lines = dict(lines or {})
        self.problems = sorted(problems, key=lambda problem: self._line(problem) or 0)
        super().__init__(str(self))

    def __str__(self) -> str:
        texts = [self._text(problem) for problem in self.problems]
        if len(texts) == 1:
            return f"{self.source}: {texts[0]}"
        return "\n  ".join([f"{self.source}: {len(texts)} problems", *texts])

    def _line(self, problem: Problem) -> int | None:
        """Line of the problem's place, or of the nearest place around it that is in the file."""
        places = (problem.location[:n] for n in range(len(problem.location), 0, -1))
        return next((self.lines[place] for place in places if place in self.lines), None)

    def _text(self, problem: Problem) -> str:
        line = self._line(problem)
        path = ".".join(str(part) for part in problem.location)
        return f"{f'line {line}: ' if line else ''}{f'{path}: ' if path else ''}{problem.message}"


@dataclass
class Document:
    """A YAML file's content and the line (from 1) on which the value at each location starts."""

    source: str
    data: Any
    lines: dict[Location, int] = field(default_factory=dict)


class _Loader(yaml.SafeLoader):
    """YAML's safe types; ``1e-3`` is a number, as everybody means it (YAML 1.1 wants ``1.0e-3``)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def parse_yaml(text: str, source: str) -> Document:
    """Parse YAML with safe types only.

    Raises
    ------
    SettingsError
        for a syntax error (with its line) and for keys given twice.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        lines: dict[Location, int] = {}
        problems: list[Problem] = []
        if node is not None:
            _index(node, (), lines, problems, set())
        if problems:
            raise SettingsError(source, problems, lines)
        return Document(source, None if node is None else _tree(loader.construct_document(node)), lines)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise SettingsError(source, [Problem((), f"{where}not valid YAML: {error.problem}")]) from None
    except yaml.YAMLError as error:
        raise SettingsError(source, [Problem((), f"not valid YAML: {error}")]) from None
    finally:
        loader.dispose()


def read_yaml(path: str | Path) -> Document:
    """Read a YAML file; see `parse_yaml`. A file that cannot be read is a `SettingsError` too."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise SettingsError(str(path), [Problem((), f"cannot be read: {reason}")]) from None
    return parse_yaml(text, str(path))


def _tree(value: Any) -> Any:
    """What aliases share as one copy each, so that a change at one place stays there."""
    if isinstance(value, dict):
        return {key: _tree(item) for key, item in value.items()}
    return [_tree(item) for item in value] if isinstance(value, list) else value


def _index(
    node: yaml.Node, at: Location, lines: dict[Location, int], problems: list[Problem], above: set[int]
) -> None:
    lines[at] = node.start_mark.line + 1
    if id(node) in above:
        problems.append(Problem(at, "an alias that contains itself"))
        return
    above = above | {id(node)}
    if isinstance(node, yaml.MappingNode):
        seen: dict[Hashable, int] = {}
        for key, value in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else str(key.value)
            line = key.start_mark.line + 1
            if name in seen and key.tag != "tag:yaml.org,2002:merge":
                problems.append(Problem((*at, name), f"given twice (first on line {seen[name]})"))
            seen[name] = line
            _index(value, (*at, name), lines, problems, above)
            lines[(*at, name)] = line
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            _index(value, (*at, index), lines, problems, above)


def nearest(word: str, words: Iterable[str]) -> str:
    """``"; did you mean x?"``, or the list of what is possible where nothing is near."""
    known = sorted(words)
    lowered = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower(), lowered, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {lowered[close[0]]}?"
    return f"; known: {', '.join(known)}" if known else ""


def repeated(names: Sequence[str]) -> list[str]:
    """Names that stand more than once among ``names``, sorted."""
    return sorted({name for name in names if names.count(name) > 1})


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of the sentence that says that ``name`` is unknown: ``"; did you mean 'x'?"``, or a full stop.

    For names of data, which are often long and alike; keys are `nearest`'s, which lists them itself.
    """
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.4)
    return f"; did you mean {close[0]!r}?" if close else "."


def validate(
    model: type[M], data: Any, at: Location = (), context: dict[str, Any] | None = None
) -> tuple[M | None, list[Problem]]:
    """The model of ``data``, or None and everything that is wrong with it, located under ``at``."""
    try:
        return model.model_validate(data, context=context), []
    except ValidationError as error:
        found: dict[Location, list[str]] = {}
        for detail in error.errors(include_url=False):
            path, owner, in_union = _walk(model, detail["loc"])
            message = _words(dict(detail), owner, _at(data, path[:-1]))
            texts = found.setdefault((*at, *path), [])
            if message not in texts and (not texts or in_union):
                texts.append(message)
        return None, [Problem(location, ", or ".join(texts)) for location, texts in found.items()]


def _at(data: Any, path: Location) -> Any:
    """What is at a place of ``data``; None where there is nothing."""
    for key in path:
        try:
            data = data[key]
        except (KeyError, IndexError, TypeError):
            return None
    return data


def _words(detail: dict[str, Any], owner: type[BaseModel] | None, where: Any) -> str:
    kind, message, given = detail["type"], str(detail["msg"]), detail["input"]
    if kind == "extra_forbidden":
        return "unknown key" + nearest(str(detail["loc"][-1]), _keys(owner, where) if owner else ())
    if kind == "missing":
        return "missing"
    if kind == "value_error":
        return message.removeprefix("Value error, ")
    if kind == "assertion_error":
        return message.removeprefix("Assertion failed, ")
    if kind == "too_short":
        return f"expected {detail['ctx']['min_length']} or more, got {detail['ctx']['actual_length']}"
    shown = repr(given)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return f"expected keys and values, got {shown}"
    expected = re.sub(r"^Input should be ", "expected ", message)
    suggestion = ""
    if kind == "literal_error" and isinstance(given, str):
        choices = re.findall(r"'([^']*)'", str(detail.get("ctx", {}).get("expected", "")))
        close = difflib.get_close_matches(given, choices, n=1)
        suggestion = f"; did you mean {close[0]}?" if close else ""
    return f"{expected}, got {shown}{suggestion}"


def _walk(
    model: type[BaseModel], loc: tuple[str | int, ...]
) -> tuple[Location, type[BaseModel] | None, bool]:
    """Follow an error's location through the annotations.

    Returns the location as a person would write it (without the names of a union's members), the model that
    owns the last key, and whether the way passed a union.
    """
    path: list[str | int] = []
    here: Any = model
    owner: type[BaseModel] | None = model
    in_union = False
    for part in loc:
        here = _bare(here)
        members = _union(here)
        if len(members) > 1:
            in_union = True
            named = [m for m in members if getattr(m, "__name__", None) == part or part in _tags(m)]
            here = named[0] if named else next((m for m in members if _is_model(m)), members[0])
            continue
        if members:
            here = _bare(members[0])
        if _is_model(here):
            owner = here
            info = next((f for n, f in here.model_fields.items() if part in (n, f.alias)), None)
            path.append(part)
            here = info.annotation if info is not None else Any
        elif get_origin(here) in (list, tuple, set, frozenset, dict) or isinstance(part, int):
            arguments = [a for a in get_args(here) if a is not Ellipsis]
            if part == "[key]":
                continue
            path.append(part)
            here = arguments[-1] if arguments else Any
        elif here is Any:
            path.append(part)
    return tuple(path), owner, in_union


def _keys(model: type[BaseModel], given: Any) -> set[str]:
    """Keys of a model, and of the models derived from it, one of which may stand in its place: of those alone
    that have the name which is ``given`` beside, if any has."""
    name = given.get("name") if isinstance(given, Mapping) else None
    models = [*_derived(model)]
    named = [one for one in models if name in _tags(one)]
    return {info.alias or key for one in named or models for key, info in one.model_fields.items()}


def _derived(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    yield model
    for derived in model.__subclasses__():
        yield from _derived(derived)


def _bare(annotation: Any) -> Any:
    while get_origin(annotation) is typing.Annotated:
        annotation = get_args(annotation)[0]
    return annotation


def _union(annotation: Any) -> list[Any]:
    """The members of a union apart from None; empty for what is not a union."""
    if get_origin(annotation) not in (typing.Union, types.UnionType):
        return []
    return [_bare(a) for a in get_args(annotation) if a is not type(None)]


def _tags(member: Any) -> list[str]:
    """Values of literal fields: what a discriminated union calls this member."""
    if not _is_model(member):
        return []
    return [v for f in member.model_fields.values() for v in get_args(f.annotation) if isinstance(v, str)]


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
