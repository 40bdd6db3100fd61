"""Predictions of a trained model on whole boxes (stage `predict`).

A box is cut into tiles with halos as wide as the model's reach, so that every voxel is what it would be with
the whole box in memory; opposite faces touch. Slabs of tiles are shared over ranks, and each is written as
whole chunks.
"""

import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor

from galdist.config import StrictModel
from galdist.data.datasets import Box, Tile, find_boxes, tiles, to_device
from galdist.grids.store import Chunking, GridStore, Split, StoreError, create_store, open_store
from galdist.models import Objective
from galdist.statistics.metrics import metric_row, save_metrics
from galdist.training.checkpoint import load_model
from hpc import ddp, durable, progress

log = logging.getLogger(__name__)


class PredictConfig(StrictModel):
    """Settings of a prediction."""

    split: Split = "test"
    """Simulations to predict."""
    tile: PositiveInt = 64
    """Side of the tiles [cells]: more need more memory, less waste more on halos."""
    halo: NonNegativeInt | None = None
    """Cells around a tile that are read with it. By default the model's reach, which makes tiles exact; a
    smaller halo is faster and leaves differences near the faces of tiles."""
    precision: Literal["fp32", "bf16"] = "fp32"


def predict(config: PredictConfig, inputs: Mapping[str, list[Path]], out: Path) -> None:
    """Predict the boxes of a split; every rank calls it.

    Called again on the same folder it does the slabs that are not yet there.

    Parameters
    ----------
    config
        settings.
    inputs
        `grids`: steps with a `grids.zarr`; `model`: the train step.
    out
        step folder. Gets `prediction.zarr` (root attributes: `checkpoint`, the sha256 of the weights, and
        `model`, the family's name) and, where the stores hold the truth, `metrics.json`.

    Raises
    ------
    ValueError
        where there is nothing to predict, or the grids lack what the model reads.
    hpc.ddp.Stopped
        where a signal asked to stop; slabs that are done stay.
    """
    with ddp.group() as group, ddp.stop_requests() as stop:
        objective, checksum = load_model(inputs["model"][0])
        boxes = _boxes(inputs["grids"], config.split)
        n_mesh = _n_mesh(boxes, objective)
        halo = objective.reach if config.halo is None else config.halo
        slabs = _slabs(tiles(n_mesh, config.tile, halo, objective.alignment))
        truth = all(field in box.open().fields for box in boxes for field in objective.fields)
        parts = out / "parts"
        path = out / "prediction.zarr"
        if group.is_main and not _began(path, checksum):
            n_bytes = sum(4 * field.components for field in objective.outputs) * n_mesh**3 * len(boxes)
            durable.require_space(out, n_bytes, f"predictions of {len(boxes)} boxes before compression")
            shutil.rmtree(parts, ignore_errors=True)  # slabs of another store
            create_store(
                path,
                [box.open().attrs for box in boxes],
                objective.outputs,
                n_mesh,
                Chunking(chunk=slabs[0][0].shape[0]),
                {"checkpoint": checksum, "model": objective.config.name},
            )
        group.barrier()
        store = open_store(path, mode="r+")
        objective.to(group.device)
        items = [(box, n) for box in boxes for n in range(len(slabs))]
        for count, (box, n) in enumerate(items):
            part = parts / f"{box.name}-{n:04d}.json"
            if count % group.world_size == group.rank and not part.exists() and not stop:
                with torch.autocast(group.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                    sums = _predict_slab(objective, box, slabs[n], store, truth, group.device)
                durable.write_json(part, {name: value.tolist() for name, value in sums.items()})
            if group.is_main:
                progress.report(count + 1, len(items), box.name)
        (stopped,) = group.any(bool(stop))
        if stopped:
            raise ddp.Stopped(stop.signum)
        if group.is_main and truth:
            _save_metrics(out, objective, boxes, parts, len(slabs))
        group.barrier()


def _predict_slab(
    objective: Objective, box: Box, slab: Sequence[Tile], store: GridStore, truth: bool, device: torch.device
) -> dict[str, Tensor]:
    """Predict the tiles of a slab and write it; what its metrics need, where the truth is known."""
    grids = box.open()
    n_mesh = grids.n_mesh
    fields = objective.fields if truth else objective.inputs
    thickness = slab[0].shape[0]
    planes = {
        field.name: np.empty((field.components, thickness, n_mesh, n_mesh), np.float32)
        for field in objective.outputs
    }
    sums: dict[str, Tensor] = {}
    for tile in slab:
        batch = to_device(tile.batch({field: grids.array(field) for field in fields}), device)
        with torch.no_grad():
            new, predicted = objective.evaluate(batch) if truth else ({}, objective.predict(batch))
        sums = {name: sums[name] + value.cpu() if sums else value.cpu() for name, value in new.items()}
        _, y, x = tile.interior
        for name, values in predicted.items():
            planes[name][:, :, y, x] = values[0].float().cpu().numpy()
    for field in objective.outputs:
        filled = planes[field.name]
        store[box.name].write(field.name, filled if field.components > 1 else filled[0], slab[0].origin[0])
    return sums


def _save_metrics(out: Path, objective: Objective, boxes: Sequence[Box], parts: Path, n_slabs: int) -> None:
    """Metrics of each box and of all together; sums are added in one order, whoever made them."""
    rows = []
    total: dict[str, Tensor] = {}
    for box in boxes:
        sums: dict[str, Tensor] = {}
        for n in range(n_slabs):
            part = durable.read_json(parts / f"{box.name}-{n:04d}.json")
            new = {name: _tensor(value) for name, value in part.items()}
            sums = {name: sums[name] + value if sums else value for name, value in new.items()}
        rows += [metric_row(name, box.name, value) for name, value in objective.summarize(sums).items()]
        total = {name: total[name] + value if total else value for name, value in sums.items()}
    if len(boxes) > 1:
        rows += [metric_row(name, "all", value) for name, value in objective.summarize(total).items()]
    save_metrics(out, rows)


def _tensor(value: Any) -> Tensor:
    tensor = torch.tensor(value)
    return tensor.double() if tensor.is_floating_point() else tensor


def _boxes(steps: Sequence[Path], split: Split) -> list[Box]:
    boxes = find_boxes(steps, split)
    names = [box.name for box in boxes]
    where = ", ".join(str(step / "grids.zarr") for step in steps)
    if not boxes:
        raise ValueError(f"{where}: no simulation has the split {split!r}; choose another `split`")
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"{where}: {min(twice)!r} is in two stores; predict them in two steps")
    return boxes


def _n_mesh(boxes: Sequence[Box], objective: Objective) -> int:
    """The mesh of all boxes; every input of the model is looked for in each."""
    meshes = {}
    for box in boxes:
        grids = box.open()
        for field in objective.inputs:
            grids.array(field)
        meshes[grids.n_mesh] = box.name
    if len(meshes) > 1:
        raise ValueError(f"meshes differ ({meshes}); predict stores of one n_mesh")
    return next(iter(meshes))


def _slabs(blocks: Sequence[Tile]) -> list[list[Tile]]:
    """Tiles that share their planes: what one rank writes at a time."""
    slabs: dict[int, list[Tile]] = {}
    for tile in blocks:
        slabs.setdefault(tile.origin[0], []).append(tile)
    return list(slabs.values())


def _began(path: Path, checksum: str) -> bool:
    """Whether the store was created for these weights before."""
    try:
        return open_store(path).attrs.get("checkpoint") == checksum
    except StoreError:
        return False
