"""Checkpoints and trained models on disk: whole or absent, checked when read, never pickled code.

A checkpoint is a folder written under a temporary name and renamed: weights as safetensors, training state as
tensors and plain values that load with ``weights_only=True``, and last a manifest with the checksum of each
file.
"""

import contextlib
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from galdist.models import Objective, from_description
from hpc import durable

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"
STATE = "state.pt"
MODEL = "model.yaml"


class CheckpointError(ValueError):
    """A checkpoint or model that is damaged, unfinished or of another kind."""


class Checkpoints:
    """The checkpoints of a training run, in one folder.

    Names sort by age: ``step-00000120``. A checkpoint that training resumes from may name others that it
    needs (the best model so far); those are kept as long as it is.
    """

    KEPT = 2  # the newest, and the one before in case the newest is damaged

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(
        self,
        name: str,
        weights: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, Any] | None = None,
        needs: tuple[str, ...] = (),
    ) -> None:
        """Write a checkpoint; it replaces one of the same name.

        Parameters
        ----------
        name
            folder of the checkpoint.
        weights
            state dicts by the stem of their safetensors file (``weights``, ``ema``).
        state
            tensors and plain values: whatever ``torch.load(weights_only=True)`` accepts.
        needs
            names of other checkpoints that this one refers to.
        """
        with _whole_folder(self.folder / name) as folder:
            for stem, tensors in weights.items():
                save_weights(folder / f"{stem}.safetensors", tensors)
            if state is not None:
                torch.save(dict(state), folder / STATE)
            files = {path.name: durable.sha256(path) for path in sorted(folder.iterdir())}
            durable.write_json(folder / MANIFEST, {"files": files, "needs": list(needs)})

    def weights(self, name: str, stem: str = "weights") -> dict[str, Tensor]:
        """State dict ``stem`` of the checkpoint ``name``."""
        return load_file(self.folder / name / f"{stem}.safetensors")

    def state(self, name: str) -> dict[str, Any]:
        """Training state of the checkpoint ``name``, on the CPU."""
        state: dict[str, Any] = torch.load(self.folder / name / STATE, map_location="cpu", weights_only=True)
        return state

    def check(self, name: str) -> None:
        """Read everything that the checkpoint ``name`` consists of and needs.

        Raises
        ------
        CheckpointError
            where a file is missing or its checksum differs.
        """
        for file, expected in self._manifest(name)["files"].items():
            path = self.folder / name / file
            if not path.exists():
                raise CheckpointError(f"{path} is missing")
            if durable.sha256(path) != expected:
                raise CheckpointError(f"{path} is damaged: its checksum is not the one in {MANIFEST}")
        for other in self._manifest(name)["needs"]:
            self.check(other)

    def latest(self) -> str | None:
        """Name of the newest whole checkpoint to resume from; damaged ones are told of and removed."""
        for name in reversed(self._steps()):
            try:
                self.check(name)
            except CheckpointError as error:
                log.warning("checkpoint %s cannot be used, the one before it is tried: %s", name, error)
                shutil.rmtree(self.folder / name)
            else:
                return name
        return None

    def prune(self) -> None:
        """Remove all checkpoints but the newest `KEPT` and what they need."""
        steps = self._steps()
        kept = set(steps[-self.KEPT :])
        for name in steps[-self.KEPT :]:
            with contextlib.suppress(CheckpointError):  # a damaged one needs nothing
                kept.update(self._manifest(name)["needs"])
        for path in self.folder.iterdir():
            if path.name not in kept:
                shutil.rmtree(path)

    def _steps(self) -> list[str]:
        return sorted(path.name for path in self.folder.glob("step-*"))

    def _manifest(self, name: str) -> dict[str, Any]:
        path = self.folder / name / MANIFEST
        try:
            manifest: dict[str, Any] = durable.read_json(path)
            _ = manifest["files"], manifest["needs"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} cannot be read: {error!r}") from error
        return manifest


def save_model(
    folder: Path, objective: Objective, weights: Mapping[str, Tensor], facts: Mapping[str, Any]
) -> str:
    """Write a trained model: `weights.safetensors`, then `model.yaml` with what builds it and the weights'
    checksum.

    Parameters
    ----------
    folder
        the model's folder.
    objective
        the model that the weights belong to.
    weights
        its state dict.
    facts
        what people may want to know of it (epoch, metrics); plain values.

    Returns
    -------
    str
        sha256 of the weights.
    """
    with durable.atomic_path(folder / WEIGHTS) as temporary:
        save_weights(temporary, weights)
    checksum = durable.sha256(folder / WEIGHTS)
    parameters = sum(parameter.numel() for parameter in objective.parameters())
    text = yaml.safe_dump(
        {**objective.description(), "parameters": parameters, "sha256": checksum, **facts}, sort_keys=False
    )
    durable.write_text(folder / MODEL, text)
    return checksum


def load_model(step: Path) -> tuple[Objective, str]:
    """The trained model of a train step's folder, ready to predict, and the sha256 of its weights.

    Raises
    ------
    CheckpointError
        where there is no model, or weights and description do not belong together.
    """
    folder = step / "model"
    try:
        description = yaml.safe_load((folder / MODEL).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{folder / MODEL}: no trained model here; the train stage leaves one"
        ) from error
    checksum = durable.sha256(folder / WEIGHTS)
    if checksum != description["sha256"]:
        raise CheckpointError(
            f"{folder / WEIGHTS} is not the file that {MODEL} describes (sha256 {checksum[:12]}, expected "
            f"{description['sha256'][:12]}): train again, or copy both files from one place"
        )
    objective = from_description(description)
    objective.load_state_dict(load_file(folder / WEIGHTS))
    return objective.eval(), checksum


def save_weights(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Write a state dict as safetensors."""
    save_file({name: value.detach().cpu().contiguous().clone() for name, value in weights.items()}, path)


@contextlib.contextmanager
def _whole_folder(final: Path) -> Iterator[Path]:
    """A temporary folder, flushed to the disk and renamed to ``final`` when the block ends well."""
    temporary = final.with_name(f".{final.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    for path in (*temporary.iterdir(), temporary):
        durable.sync_path(path)
    if final.exists():
        shutil.rmtree(final)
    os.replace(temporary, final)
