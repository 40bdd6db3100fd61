"""What training data are to the loop, whatever they are made of: `galdist.data.datasets` for boxes,
`galdist.data.tables` for rows."""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from hpc import ddp

Batch = dict[str, Any]

ROLES = {"crops": "grids", "rows": "catalogs"}
"""Kind of data -> the role under which a run file names the steps that have them."""


class Batches(Protocol):
    """This rank's training batches, step by step; any number of ranks trains on the same ones."""

    @property
    def steps(self) -> int:
        """Steps in an epoch."""

    def start_at(self, epoch: int, step: int) -> None:
        """Begin to make the batches of an epoch, from a step on; all of those asked for before are taken."""

    def wait(self, seconds: float) -> bool:
        """Whether the batches of the next step are there, after waiting for them for so long at most."""

    def take(self) -> list[Batch]:
        """The batches of the next step, one for each of its parts."""


class TrainingData(Protocol):
    """The training and validation samples of a model."""

    def batches(self, group: ddp.Group, batch_size: int, parts: int, seed: int) -> Batches:
        """The training samples in an order that ``seed`` decides.

        Parameters
        ----------
        batch_size
            samples of a step, over all ranks.
        parts
            parts of a step on each rank (gradient accumulation).

        Raises
        ------
        ValueError
            where ``batch_size`` cannot be shared by ``parts`` on every rank, or exceeds an epoch.
        """

    def training_fields(self, field: str) -> Iterator[NDArray[Any]]:
        """A field or column of every training simulation, one at a time."""

    def validation_batches(self, group: ddp.Group, done: int = 0) -> Iterator[Batch | None]:
        """The validation samples in rounds: a batch for each rank, None for those that the last round leaves
        out. The first ``done`` batches (of all ranks) are left out."""

    def close(self) -> None:
        """Training is done: remove what was kept for it."""


def share(batch_size: int, parts: int, world_size: int) -> int:
    """Samples of a part of a step on one rank.

    Raises
    ------
    ValueError
        where the batch cannot be shared equally.
    """
    if batch_size % (parts * world_size):
        raise ValueError(
            f"batch_size is {batch_size}: it must be a multiple of ranks x accumulate = "
            f"{world_size} x {parts}, so that every rank does the same work"
        )
    return batch_size // (parts * world_size)


def check_role(role: str, inputs: Mapping[str, Collection[str]], model: str) -> None:
    """Refuse names of steps, by role, that are not what a model learns from.

    Raises
    ------
    ValueError
        where there is none under ``role``, or one under the role of another kind of data.
    """
    given = {other: inputs[other] for other in ROLES.values() if inputs.get(other)}
    if list(given) != [role]:
        found = ", ".join(f"{other}: [{', '.join(given[other])}]" for other in given)
        raise ValueError(
            f"{model} learns from {role}: the step's inputs must have steps under `{role}`"
            f"{' and no others' if given else ''}; of {' and '.join(ROLES.values())} they have "
            f"{found or 'none'}"
        )


def steps_to_read(role: str, inputs: Mapping[str, list[Path]], model: str) -> list[Path]:
    """The steps that a model learns from, which a run file names under ``role``.

    Raises
    ------
    ValueError
        as `check_role`.
    """
    check_role(role, {other: [step.name for step in steps] for other, steps in inputs.items()}, model)
    return inputs[role]
