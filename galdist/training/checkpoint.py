"""Checkpoints and trained models on disk: whole or absent, checked when read, never pickled code.

A checkpoint is a folder written under a temporary name and renamed: weights as safetensors, training state as
tensors and plain values that load with ``weights_only=True``, and last a manifest with the checksum of each
file.
"""

import contextlib
import hashlib
import io
import logging
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import yaml
from torch import Tensor

import galdist
from galdist.catalogs.catalog import open_catalog
from galdist.catalogs.columns import PositionSource
from galdist.grids.store import open_store
from galdist.models import GridObjective, Objective, from_description
from galdist.models.tables import TableObjective
from hpc import durable

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"
STATE = "state.pt"
MODEL = "model.yaml"
LICENSE = "GPL-3.0-or-later"
"""Of the weights, as of the code that made them."""


class CheckpointError(ValueError):
    """A checkpoint or model that is damaged, unfinished, of another kind, or cannot be written."""


class Checkpoints:
    """The checkpoints of a training run, in one folder. Names sort by age: ``step-00000120``.

    Each holds all that training goes on from, so that a damaged one takes no other with it.
    """

    def __init__(self, folder: Path, kept: int = 2) -> None:
        """``kept``: how many of the newest stay; two at least, for the newest may turn out damaged."""
        self.folder, self.kept = folder, kept

    def write(self, step: int, weights: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
        """Write a checkpoint, then remove those that are too old; it replaces one of the same step.

        Parameters
        ----------
        step
            global step that training has reached.
        weights
            state dicts by the stem of their safetensors file (``weights``, ``ema``).
        state
            tensors and plain values: whatever ``torch.load(weights_only=True)`` accepts.

        Raises
        ------
        hpc.durable.NotEnoughSpace
            where the disk, or a quota, is full; nothing is left of it, and the earlier ones stay.
        """
        name = f"step-{step:08d}"
        needed = (_nbytes(weights) + _nbytes(state)) / 1e6
        with (
            durable.room_for(f"checkpoint {name} ({needed:.1f} MB)", self.folder),
            _whole_folder(self.folder / name) as folder,
        ):
            checksums = {}
            for file, data in _files(weights, state):
                checksums[file] = hashlib.sha256(data).hexdigest()
                (folder / file).write_bytes(data)
            durable.write_json(folder / MANIFEST, {"files": checksums})
        for old in self._names()[: -self.kept]:
            shutil.rmtree(self.folder / old, ignore_errors=True)  # what cannot go now goes after the next one

    def weights(self, name: str, stem: str = "weights") -> dict[str, Tensor]:
        """State dict ``stem`` of the checkpoint ``name``; empty where it has none."""
        path = self.folder / name / f"{stem}.safetensors"
        return safetensors.torch.load_file(path) if path.exists() else {}

    def state(self, name: str) -> dict[str, Any]:
        """Training state of the checkpoint ``name``, on the CPU."""
        state: dict[str, Any] = torch.load(self.folder / name / STATE, map_location="cpu", weights_only=True)
        return state

    def latest(self) -> str | None:
        """Name of the newest whole checkpoint; damaged and unfinished ones are told of and removed."""
        for path in self.folder.glob(".*"):
            shutil.rmtree(path, ignore_errors=True)
        for name in reversed(self._names()):
            try:
                self._check(name)
            except CheckpointError as error:
                log.warning("checkpoint %s cannot be used, the one before it is tried: %s", name, error)
                shutil.rmtree(self.folder / name)
            else:
                return name
        return None

    def _check(self, name: str) -> None:
        """Read every file of a checkpoint."""
        path = self.folder / name / MANIFEST
        try:
            files = dict(durable.read_json(path)["files"])
        except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
            # Another error of the file system is not the checkpoint's, which must not be removed for it.
            raise CheckpointError(f"{path} cannot be read: {error!r}") from error
        for file, expected in files.items():
            path = self.folder / name / file
            if not path.exists():
                raise CheckpointError(f"{path} is missing")
            if durable.sha256(path) != expected:
                raise CheckpointError(f"{path} is damaged: its checksum is not the one in {MANIFEST}")

    def _names(self) -> list[str]:
        return sorted(path.name for path in self.folder.glob("step-*"))


def _files(
    weights: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]
) -> Iterator[tuple[str, bytes]]:
    """Names and contents of a checkpoint's files, one in memory at a time: what writes to the disk itself
    (safetensors, torch) does not say that it is full."""
    for stem, tensors in weights.items():
        yield f"{stem}.safetensors", weight_bytes(tensors)
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    yield STATE, buffer.getvalue()


def _nbytes(value: Any) -> int:
    """Bytes of all tensors in a tree of plain values."""
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, Mapping):
        value = list(value.values())
    return sum(map(_nbytes, value)) if isinstance(value, list | tuple) else 0


def save_model(
    folder: Path, objective: Objective, weights: Mapping[str, Tensor], facts: Mapping[str, Any]
) -> str:
    """Write a trained model: `weights.safetensors`, then `model.yaml` with what builds it and the weights'
    checksum.

    What the training split decided (means, ranges) is among the weights; the folder is all that a prediction
    needs.

    Parameters
    ----------
    folder
        the model's folder.
    objective
        the model that the weights belong to.
    weights
        its state dict.
    facts
        what people may want to know of it (epoch, metrics, `table_facts`); plain values.

    Returns
    -------
    str
        sha256 of the weights.

    Raises
    ------
    hpc.durable.NotEnoughSpace
        where the disk, or a quota, is full.
    """
    data = weight_bytes(weights)
    checksum = hashlib.sha256(data).hexdigest()
    parameters = sum(parameter.numel() for parameter in objective.parameters())
    about = {"parameters": parameters, "sha256": checksum, "galdist": galdist.__version__, "license": LICENSE}
    text = yaml.safe_dump({**objective.description(), **about, **facts}, sort_keys=False, allow_unicode=True)
    with durable.room_for("the trained model", folder):
        durable.write_bytes(folder / WEIGHTS, data)
        durable.write_text(folder / MODEL, text)
    return checksum


def table_facts(objective: Objective, catalogs: Sequence[Path]) -> dict[str, Any]:
    """What `model.yaml` says of the tables that a model learned from; nothing for a model of boxes.

    ``columns``: of each input and target its role, units, range over the training rows, and its ``source``:
    what it is in the user's table (`galdist.catalogs.columns.ColumnSource`), where all tables agree.
    ``citation``: what the tables ask to be cited. Of a model that looks at neighbors, the columns ``x``,
    ``y``, ``z`` are those of positions, and ``halo_density`` is the range, over the simulations with training
    rows, of the mean number of halos [(h/Mpc)^3].

    Parameters
    ----------
    objective
        after training.
    catalogs
        step folders with a `catalog.zarr` that holds `centrals` tables.
    """
    if not isinstance(objective, TableObjective):
        return {}
    units: dict[str, str] = {}
    sources: dict[str, list[Any]] = {name: [] for name in objective.fields}
    citations: dict[str, None] = {}
    positions: list[Any] = []
    densities: list[float] = []
    for step in catalogs:
        store = open_catalog(step / "catalog.zarr")
        for simulation in store.names():
            units = store.columns(simulation, "centrals") | units
            facts = store.facts(simulation, "centrals")
            for name, found in sources.items():
                found.append(facts.get("columns", {}).get(name))
            if citation := facts.get("citation"):
                citations[str(citation)] = None
            if objective.neighborhood is not None:
                positions.append(facts.get("position"))
                split = store.table(simulation, "centrals", ["split"])["split"]
                if (split == 0).any():
                    densities.append(len(split) / store.attrs(simulation).box_size ** 3)
    columns: dict[str, Any] = {}
    for role, names in (("input", objective.inputs), ("target", objective.targets)):
        low, high = (objective.get_buffer(f"{role}_{end}").tolist() for end in ("low", "high"))
        for i, name in enumerate(names):
            columns[name] = {"role": role, "units": units.get(name, ""), "range": [low[i], high[i]]}
            first = sources[name][0] if sources[name] else None
            if first is not None and all(other == first for other in sources[name]):
                columns[name]["source"] = first
    about: dict[str, Any] = {"columns": columns}
    if objective.neighborhood is not None:
        columns |= {axis: {"role": "position", "units": "Mpc/h"} for axis in "xyz"}
        if positions and positions[0] is not None and all(other == positions[0] for other in positions):
            for axis, source in zip("xyz", PositionSource.model_validate(positions[0]).axes, strict=True):
                columns[axis]["source"] = source.model_dump(exclude_defaults=True)
        if densities:
            about["halo_density"] = [min(densities), max(densities)]
    if citations:
        about["citation"] = list(citations)
    return about


def grid_facts(objective: Objective, grids: Sequence[Path]) -> dict[str, Any]:
    """What `model.yaml` says of the boxes that a model learns from; nothing for a model of tables.

    ``grids``: the smallest and largest ``cell_size`` [Mpc/h] and ``redshift`` of the training boxes, and of
    each of the ``fields`` that it is trained on the ``units`` and the ``assignment``.

    Parameters
    ----------
    objective
        trained or not.
    grids
        step folders with a `grids.zarr`.

    Raises
    ------
    ValueError
        where a field was made with one scheme in one box and with another in another.
    """
    if not isinstance(objective, GridObjective):
        return {}
    boxes = [
        store[name]
        for store in (open_store(g / "grids.zarr") for g in grids)
        for name in store.names("train")
    ]
    fields: dict[str, dict[str, str]] = {}
    for box in boxes:
        for name in objective.fields:
            found = box.field(name)
            facts = {"units": found.units, "assignment": found.assignment}
            if fields.setdefault(name, facts) != facts:
                raise ValueError(
                    f"{box.attrs.name}: {name} has {facts}, in {boxes[0].attrs.name} it has {fields[name]}; "
                    "a model learns from boxes that were made alike: give their steps the same `fields`"
                )
    sizes, redshifts = [box.cell_size for box in boxes], [box.attrs.redshift for box in boxes]
    return {
        "grids": {
            "cell_size": [min(sizes), max(sizes)],
            "redshift": [min(redshifts), max(redshifts)],
            "fields": fields,
        }
    }


def describe_model(step: Path) -> dict[str, Any]:
    """`model.yaml` of a trained model: a train step's folder, or the `model` folder in it.

    Raises
    ------
    CheckpointError
        where there is none, or it cannot be read.
    """
    path = _model_folder(step) / MODEL
    try:
        description = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        beside = sorted(str(found.parents[1]) for found in step.glob(f"*/model/{MODEL}"))
        there = f" There are: {', '.join(beside)}" if beside else ""
        raise CheckpointError(f"{path}: no trained model here; the train stage leaves one.{there}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is damaged: {' '.join(str(error).split())}") from error
    if not isinstance(description, dict) or not {"model", "parts", "sha256"} <= description.keys():
        raise CheckpointError(f"{path} describes no model: it lacks model, parts or sha256")
    return description


def load_model(step: Path) -> tuple[Objective, str]:
    """The trained model of a train step's folder (or the `model` folder in it), ready to predict, and the
    sha256 of its weights.

    Raises
    ------
    CheckpointError
        where there is no model, weights and description do not belong together, or this version of galdist
        cannot build it.
    """
    description = describe_model(step)
    folder = _model_folder(step)
    try:
        checksum = durable.sha256(folder / WEIGHTS)
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder / WEIGHTS} is missing: copy the whole folder") from error
    if checksum != description["sha256"]:
        raise CheckpointError(
            f"{folder / WEIGHTS} is not the file that {MODEL} describes (sha256 {checksum[:12]}, expected "
            f"{str(description['sha256'])[:12]}): train again, or copy both files from one place"
        )
    try:
        objective = from_description(description)
        objective.load_state_dict(safetensors.torch.load_file(folder / WEIGHTS))
    except (ValueError, RuntimeError) as error:
        made = description.get("galdist", "another version")
        raise CheckpointError(
            f"{folder}: galdist {galdist.__version__} cannot build this model, which {made} made: {error}"
        ) from error
    return objective.eval(), checksum


def _model_folder(step: Path) -> Path:
    return step if (step / MODEL).exists() else step / "model"


def weight_bytes(weights: Mapping[str, Tensor]) -> bytes:
    """A state dict as a safetensors file; tensors may share memory and lie anywhere."""
    data: bytes = safetensors.torch.save(
        {name: value.detach().cpu().contiguous().clone() for name, value in weights.items()}
    )
    return data


@contextlib.contextmanager
def _whole_folder(final: Path) -> Iterator[Path]:
    """A temporary folder, flushed to the disk and renamed to ``final`` when the block ends well; otherwise
    removed."""
    # Names of their own: a rank of an earlier start may still write, on a node that was given up.
    temporary, replaced = (final.with_name(f".{final.name}.{uuid.uuid4().hex}") for _ in range(2))
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for path in (*temporary.iterdir(), temporary):
            durable.sync_path(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if final.exists():
        os.replace(final, replaced)
    os.replace(temporary, final)
    durable.sync_path(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)
