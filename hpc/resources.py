"""What a job asks of the machine."""

import re
from dataclasses import dataclass
from typing import Annotated

from pydantic import BeforeValidator, Field

from hpc.strict import Problem, SettingsError, StrictModel

_BYTES = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SECONDS = {"s": 1, "min": 60, "h": 3600, "d": 86400}
_NUMBER = r"(\d+(?:\.\d*)?)"


def n_bytes(text: str) -> int:
    """The bytes of ``4 GB`` or, as Slurm writes it, ``6000M``.

    Raises
    ------
    ValueError
        for anything else.
    """
    match = re.fullmatch(rf"\s*{_NUMBER}\s*([KMGT]?)i?B?\s*", text)
    if match is None:
        raise ValueError(f"expected an amount of memory such as 4 GB or 512 MB, got {text!r}")
    return int(float(match[1]) * _BYTES[match[2]])


def seconds(text: str) -> float:
    """The seconds of ``90 min`` or, as Slurm writes it, ``12:30`` (minutes), ``1:30:00``, ``1-12`` (a day and
    hours), ``1-12:00:00``.

    Raises
    ------
    ValueError
        for anything else.
    """
    if match := re.fullmatch(rf"\s*{_NUMBER}\s*(s|min|h|d)\s*", text):
        return float(match[1]) * _SECONDS[match[2]]
    if match := re.fullmatch(rf"(\d+)-(\d+)(?::(\d\d))?(?::{_NUMBER})?", text):
        scales = (86400, 3600, 60, 1)
    elif match := re.fullmatch(rf"()(?:(\d+):)?(\d+):{_NUMBER}", text):
        scales = (0, 3600, 60, 1)
    else:
        raise ValueError(f"expected a time such as 90 min, 2 h or 1:30:00, got {text!r}")
    return sum(float(part or 0) * scale for part, scale in zip(match.groups(), scales, strict=True))


def _memory(value: object) -> object:
    return n_bytes(value) if isinstance(value, str) else value


def _duration(value: object) -> object:
    return int(seconds(value)) if isinstance(value, str) else value


Memory = Annotated[int, BeforeValidator(_memory), Field(gt=0)]
"""Bytes; written as ``4 GB``."""
Duration = Annotated[int, BeforeValidator(_duration), Field(gt=0)]
"""Seconds; written as ``90 min`` or ``1:30:00``."""


@dataclass(frozen=True)
class Layout:
    """How the processes of a job lie on nodes."""

    nodes: int
    min_nodes: int
    """The fewest nodes that the job can also do with; then it has fewer ranks."""
    ranks_per_node: int
    cpus: int
    """Cores of each rank."""
    gpus: int
    """GPUs of each node."""

    @property
    def ranks(self) -> int:
        """Ranks on all nodes."""
        return self.nodes * self.ranks_per_node


class Resources(StrictModel):
    """What one job asks for. Absent values are the stage's or the machine's own.

    On one machine ``ranks`` and ``cpus`` decide how many processes run with how many threads each, and
    ``memory`` is what the Dask workers share; ``nodes``, ``gpus`` and ``time`` are requests to a scheduler,
    and where there is none nobody is asked.
    """

    ranks: Annotated[int, Field(ge=1)] | None = None
    """Processes: Dask workers, DDP ranks or MPI ranks."""
    nodes: Annotated[int, Field(ge=1)] | None = None
    min_nodes: Annotated[int, Field(ge=1)] | None = None
    """The fewest nodes that a training also accepts, when that many are up; by default ``nodes``."""
    cpus: Annotated[int, Field(ge=1)] | None = None
    """Cores, and so threads, of each process."""
    gpus: Annotated[int, Field(ge=0)] | None = None
    """GPUs of each node."""
    memory: Memory | None = None
    """Bytes for each node; written as ``4 GB``."""
    time: Duration | None = None
    """Seconds; written as ``90 min`` or ``1:30:00``."""
    retries: Annotated[int, Field(ge=0)] | None = None
    """Times a crashed job is started again from its last checkpoint; by default the site's."""

    def layout(self, runtime: str, default_ranks: int) -> Layout:
        """Nodes and ranks of a job: of a stage with this runtime and, where nobody says more, so many ranks.

        A DDP job on GPUs has one rank a GPU; the nodes of ``dask`` are its worker jobs, of one worker each
        unless ``nodes`` says otherwise. Ranks that nobody asked for are rounded up to fill the nodes.

        Raises
        ------
        hpc.strict.SettingsError
            for numbers that cannot be laid out, ranks that do not fill the nodes above all.
        """
        problems: list[Problem] = []
        gpus = self.gpus or 0
        nodes = self.nodes or (self.ranks or default_ranks if runtime == "dask" else 1)
        if runtime == "serial":
            wanted = 1
            problems += [
                Problem((key,), f"the stage is one process: leave {key} out, or ask for 1")
                for key, value in (("ranks", self.ranks), ("nodes", self.nodes))
                if (value or 1) > 1
            ]
        elif runtime == "ddp" and gpus:
            wanted = self.ranks or nodes * gpus
        else:
            wanted = self.ranks or -(-default_ranks // nodes) * nodes
        if not problems and wanted % nodes:
            low = wanted // nodes * nodes
            fitting = " or ".join(str(number) for number in (low, low + nodes) if number)
            problems.append(
                Problem(("ranks",), f"{wanted} for {nodes} nodes, which each get as many: ask for {fitting}")
            )
        if runtime == "ddp" and gpus and wanted > nodes * gpus:
            text = f"{wanted} ranks for {nodes * gpus} GPUs ({nodes} nodes of {gpus}): at most one rank a GPU"
            problems.append(Problem(("ranks",), text))
        fewest = nodes if self.min_nodes is None else self.min_nodes
        if fewest > nodes:
            problems.append(Problem(("min_nodes",), f"{fewest} is more than nodes, which is {nodes}"))
        elif nodes % fewest:
            text = f"{fewest} does not divide nodes, which is {nodes}, so a batch cannot be shared alike"
            problems.append(Problem(("min_nodes",), text))
        elif fewest < nodes and runtime != "ddp":
            problems.append(
                Problem(("min_nodes",), "only a DDP job can go on with fewer nodes: leave it out")
            )
        if problems:
            raise SettingsError("resources", problems)
        return Layout(nodes, fewest, wanted // nodes, self.cpus or 1, gpus)
