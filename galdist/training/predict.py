"""Predictions of a trained model on whole boxes (stage `predict`).

A box is cut into tiles with halos as wide as the model's reach, so that every voxel is what it would be with
the whole box in memory; opposite faces touch. Slabs of tiles are shared over ranks, and each is written as
whole chunks. Before every tile the ranks agree whether to go on, so that none waits long for another.

Families that draw all voxels of a box jointly (`ModelConfig.draws_boxes`) have no such slabs: a draw is
written when it is whole. Ranks share the crops of one draw, or, where a box is one crop, the draws.
"""

import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, NonNegativeInt
from torch import Tensor

from galdist.config import StrictModel
from galdist.data.datasets import Box, Tile, find_boxes, read_parameters, tiles, to_device
from galdist.grids.store import Chunking, GridStore, Split, StoreError, create_store, open_store
from galdist.grids.store import Field as GridField
from galdist.models import GridObjective, ModelConfig
from galdist.models.samplers import Drawing
from galdist.statistics.metrics import metric_row, over_domains, save_metrics
from galdist.training.checkpoint import describe_model, load_model
from galdist.training.train import learned
from hpc import ddp, durable, progress
from hpc.strict import repeated

log = logging.getLogger(__name__)

_CELLS_ALIKE = 1.05  # boxes of 25 and of 205 Mpc/h have no cell size in common, but one to 3%


class PredictConfig(StrictModel):
    """Settings of a prediction."""

    split: Split | Literal["all"] = "test"
    """Simulations to predict: ``all`` where something is to be trained on the predictions."""
    tile: Annotated[int, Field(ge=4)] = 64
    """Side of the tiles [cells], which divides the mesh: more need more memory, less waste more on halos.
    Models that draw whole boxes (vdm) are evaluated in tiles, where the truth is known; what they draw does
    not depend on them."""
    halo: NonNegativeInt | None = None
    """Cells around a tile that are read with it. By default the model's reach, which makes tiles exact; a
    smaller halo is faster and leaves differences near the faces of tiles."""
    precision: Literal["fp32", "bf16"] = "fp32"
    samples: NonNegativeInt = 0
    """Draws of the counts to store beside their mean, as fields `galaxy_counts_sample_0` and so on; only for
    models that have a distribution of them. Of models that give no mean, `galaxy_counts` is a draw too."""
    seed: NonNegativeInt = 0
    """Of the draws. They depend on it and the simulation, not on tiles or ranks."""
    drawing: Drawing = Drawing()
    """How models that draw whole boxes (vdm) draw them."""

    def check_inputs(self, inputs: Mapping[str, Mapping[str, StrictModel | None]]) -> None:
        """See `galdist.config.ChecksInputs`."""
        for step, model in learned(inputs.get("model", {})).items():
            self.check_model(model, f"step {step}")

    def check_model(self, model: ModelConfig, which: str) -> None:
        """Refuse a trained model that is not of grids, or that cannot draw what is asked of it.

        Parameters
        ----------
        model
            its settings.
        which
            what the message calls it.

        Raises
        ------
        ValueError
            that says what to change.
        """
        if model.learns_from != "crops":
            raise ValueError(
                f"{which} is a model of tables ({model.name}), this stage predicts grids: draw galaxies for "
                "halos with the stage `sample`"
            )
        if self.samples and not model.drawn:
            raise ValueError(
                f"samples is {self.samples}, but {which} ({model.name}) gives means, of which nothing can be "
                "drawn: leave it out, or train with a likelihood as model.loss"
            )
        if not model.draws_boxes and self.drawing != Drawing():
            given = self.drawing.model_dump(mode="json", exclude_defaults=True)
            raise ValueError(
                f"drawing is {given}, but {which} ({model.name}) predicts each voxel by itself and draws no "
                "whole boxes: leave it out"
            )


def predict(config: PredictConfig, inputs: Mapping[str, list[Path]], out: Path) -> None:
    """Predict the boxes of a split; every rank calls it.

    Called again on the same folder it does the slabs and draws that are not yet there.

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
        where there is nothing to predict, the grids lack what the model reads, their cells differ by more
        than 5% from those that the model learned from, fields were made with another assignment scheme, tiles
        or crops do not fit the mesh, samples are asked of a model that gives means, or a drawing of one that
        draws no whole boxes.
    hpc.ddp.Stopped
        where a signal asked to stop, before the next tile or step of a draw; slabs and draws that are done
        stay.
    """
    with ddp.group() as group, ddp.stop_requests() as stop:
        objective, checksum = load_model(inputs["model"][0])
        config.check_model(objective.config, str(inputs["model"][0]))
        assert isinstance(objective, GridObjective)
        boxes = _boxes(inputs["grids"], config.split)
        n_mesh = _n_mesh(boxes, objective)
        trained = describe_model(inputs["model"][0]).get("grids", {})
        _check_alike(boxes, trained, inputs["model"][0], group.is_main)
        halo = objective.reach if config.halo is None else config.halo
        slabs = _slabs(tiles(n_mesh, config.tile, halo, objective.alignment))
        n_crops = objective.crops(n_mesh, config.drawing) if objective.config.draws_boxes else 0
        # A slab is a layer of whole chunks.
        thickness = _chunk(n_mesh) if n_crops else slabs[0][0].shape[0]
        if n_mesh % thickness:
            sides = [n for n in range(4, n_mesh + 1) if not n_mesh % n and not n % objective.alignment]
            raise ValueError(
                f"tile is {config.tile}, which does not divide n_mesh = {n_mesh}: one of {sides}"
            )
        truth = all(field in box.open().fields for box in boxes for field in objective.fields)
        parts = out / "parts"
        path = out / "prediction.zarr"
        if group.is_main and not _began(path, checksum):
            fields = [
                _as_learned(field, trained)
                for field in (*objective.outputs, *_drawn(objective, config.samples))
            ]
            n_bytes = sum(4 * field.components for field in fields) * n_mesh**3 * len(boxes)
            durable.require_space(out, n_bytes, f"predictions of {len(boxes)} boxes before compression")
            shutil.rmtree(parts, ignore_errors=True)  # slabs of another store
            create_store(
                path,
                [box.open().attrs for box in boxes],
                fields,
                n_mesh,
                Chunking(chunk=thickness),
                {"checkpoint": checksum, "model": objective.config.name},
            )
        group.barrier()
        store = open_store(path, mode="r+")
        objective.to(group.device)
        prediction = _Prediction(objective, store, truth, n_crops > 0, group.device, config, parts)
        draws = [(box, number) for box in boxes for number in range(1 + config.samples if n_crops else 0)]
        items = [
            (box, number) for box in boxes for number in range(len(slabs) if truth or not n_crops else 0)
        ]
        # As the main rank sees it: a file system may show the others less, and all must share alike.
        undrawn, missing = group.broadcast(
            (
                [item for item in draws if not prediction.drawn(*item).exists()],
                [item for item in items if not prediction.part(*item).exists()],
            )
        )
        total = len(draws) + len(items)

        def work() -> Iterator[None]:
            done = total - len(undrawn) - len(missing)
            together = group if n_crops > 1 else None
            first, stride = (0, 1) if together else (group.rank, group.world_size)
            for box, number in undrawn[first::stride]:
                for share in prediction.draw(box, number, together):
                    if group.is_main:
                        progress.report(min(done + share * stride, total), total, box.name)
                    yield
                done += stride
            for box, number in missing[group.rank :: group.world_size]:
                yield from prediction.slab(box, number, slabs[number])
                done = min(done + group.world_size, total)
                if group.is_main:
                    progress.report(done, total, box.name)

        mine, busy = work(), True
        while busy:
            stopped, busy = group.any(bool(stop), next(mine, mine) is None)
            if stopped:
                raise ddp.Stopped(stop.signum)
        if group.is_main and truth:
            _save_metrics(out, prediction, boxes, len(slabs))
        group.barrier()


@dataclass(frozen=True)
class _Prediction:
    """What every slab and draw needs to know."""

    objective: GridObjective
    store: GridStore
    truth: bool
    """Whether the grids hold what is predicted, for metrics."""
    joint: bool
    """Whether boxes are drawn whole; slabs have metrics only."""
    device: torch.device
    config: PredictConfig
    parts: Path

    def part(self, box: Box, number: int) -> Path:
        """What the metrics of a slab need; it is there when the slab is in the store."""
        return self.parts / f"{box.name}-{number:04d}.json"

    def drawn(self, box: Box, number: int) -> Path:
        """There when a draw of the whole box is in the store."""
        return self.parts / f"{box.name}-{number:04d}.drawn"

    def draw(self, box: Box, number: int, group: ddp.Group | None) -> Iterator[float]:
        """Draw a whole box, with the share that is done before each step, and write it; the draw 0 is the
        prediction itself."""
        grids = box.open()
        (tile,) = tiles(grids.n_mesh, grids.n_mesh, 0, 1)
        batch = tile.batch(
            {field: grids.array(field) for field in self.objective.inputs},
            read_parameters(box, self.objective.simulation_parameters),
        )
        seed = np.random.SeedSequence([self.config.seed, *box.name.encode(), number])
        generator = torch.Generator().manual_seed(int(seed.generate_state(1, np.uint64)[0] >> 1))
        steps = self.objective.draw_boxes(batch, generator, self.config.drawing, group)
        made: dict[str, Tensor] | float = 0.0
        while isinstance(made, float):
            yield made
            with self._autocast():
                made = next(steps)
        if group is not None and not group.is_main:
            return
        with durable.room_for(f"draw {number} of {box.name}", self.store.path):
            for field in self.objective.outputs:
                name = _sample_name(field.name, number - 1) if number else field.name
                values = made[field.name][0].numpy()
                self.store[box.name].write(name, values if field.components > 1 else values[0])
            durable.write_json(self.drawn(box, number), {})

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")

    def slab(self, box: Box, number: int, slab: Sequence[Tile]) -> Iterator[None]:
        """Predict, or evaluate, the tiles of a slab, with a pause before each, and write what comes of it."""
        objective, config = self.objective, self.config
        grids = box.open()
        n_mesh = grids.n_mesh
        meshes = {
            field: grids.array(field) for field in (objective.fields if self.truth else objective.inputs)
        }
        parameters = read_parameters(box, objective.simulation_parameters)
        thickness = slab[0].shape[0]
        outputs = () if self.joint else (*objective.outputs, *_drawn(objective, config.samples))
        planes = {
            field.name: np.empty((field.components, thickness, n_mesh, n_mesh), np.float32)
            for field in outputs
        }
        sums: dict[str, Tensor] = {}
        for tile in slab:
            yield
            batch = to_device(tile.batch(meshes, parameters), self.device)
            with torch.no_grad(), self._autocast():
                new, predicted = objective.evaluate(batch) if self.truth else ({}, {})
                if not self.joint:
                    predicted = predicted or objective.predict(batch)
                if config.samples and not self.joint:
                    uniforms = voxel_uniforms(
                        tile, n_mesh, (config.seed, *box.name.encode()), config.samples, self.device
                    )
                    for name, draws in objective.draw(batch, uniforms).items():
                        predicted |= {
                            _sample_name(name, n): draws[:, n : n + 1] for n in range(config.samples)
                        }
            sums = {name: sums[name] + value.cpu() if sums else value.cpu() for name, value in new.items()}
            _, y, x = tile.interior
            for name, values in predicted.items():
                planes[name][:, :, y, x] = values[0].float().cpu().numpy()
        with durable.room_for(f"slab {number} of {box.name}", self.store.path):
            for field in outputs:
                filled = planes[field.name] if field.components > 1 else planes[field.name][0]
                self.store[box.name].write(field.name, filled, slab[0].origin[0])
            durable.write_json(self.part(box, number), {name: value.tolist() for name, value in sums.items()})


def _sample_name(field: str, n: int) -> str:
    return f"{field}_sample_{n}"


def _drawn(objective: GridObjective, samples: int) -> list[GridField]:
    """The fields of the draws."""
    return [
        field.model_copy(update={"name": _sample_name(field.name, n)})
        for field in objective.drawn
        for n in range(samples)
    ]


def voxel_uniforms(
    tile: Tile, n_mesh: int, seed: Sequence[int], samples: int, device: torch.device
) -> Tensor:
    """Uniform random numbers in [0, 1) of a tile's voxels, ``(1, samples, z, y, x)`` float64.

    Each is a function of the seed, the sample and the voxel: the output of SplitMix64 (Steele, Lea & Flood
    2014) at the voxel's place in the sequence of the sample, which is the same on any device.
    """
    z, y, x = (torch.arange(cells.start, cells.stop, device=device) for cells in tile.interior)
    place = (z[:, None, None] * n_mesh + y[:, None]) * n_mesh + x
    keys = [np.random.SeedSequence([*seed, n]).generate_state(1, np.uint64) for n in range(samples)]
    start = torch.from_numpy(np.concatenate(keys).view(np.int64)).to(device)
    words = split_mix(start[:, None, None, None] + (place + 1) * _signed(0x9E3779B97F4A7C15))
    return (_shifted(words, 11).double() * 2.0**-53)[None]


def split_mix(states: Tensor) -> Tensor:
    """Words of 64 bits that SplitMix64 gives in its ``states``, as int64."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        states = (states ^ _shifted(states, shift)) * _signed(factor)
    return states ^ _shifted(states, 31)


def _signed(word: int) -> int:
    """A word of 64 bits as torch has it."""
    return word - (1 << 64) if word >> 63 else word


def _shifted(words: Tensor, bits: int) -> Tensor:
    """Words shifted to the right, zeros coming in."""
    return (words >> bits) & ((1 << (64 - bits)) - 1)


def _save_metrics(out: Path, prediction: _Prediction, boxes: Sequence[Box], n_slabs: int) -> None:
    """Metrics of each box and of all that are alike; sums are added in one order, whoever made them."""
    objective = prediction.objective
    rows = []
    totals: dict[str, dict[str, Tensor]] = {}
    for box in boxes:
        sums: dict[str, Tensor] = {}
        for number in range(n_slabs):
            part = durable.read_json(prediction.part(box, number))
            new = {name: _tensor(value) for name, value in part.items()}
            sums = {name: sums[name] + value if sums else value for name, value in new.items()}
        rows += [metric_row(name, box.name, value) for name, value in objective.summarize(sums).items()]
        totals[box.name] = sums
    for together, names in over_domains("all", {b.name: Path(b.store).parent.name for b in boxes}).items():
        if len(boxes) > 1:
            first, *others = (totals[name] for name in names)
            total = reduce(lambda one, other: {key: one[key] + other[key] for key in one}, others, first)
            rows += [metric_row(name, together, value) for name, value in objective.summarize(total).items()]
    save_metrics(out, rows)


def _tensor(value: Any) -> Tensor:
    tensor = torch.tensor(value)
    return tensor.double() if tensor.is_floating_point() else tensor


def _boxes(steps: Sequence[Path], split: Split | Literal["all"]) -> list[Box]:
    boxes = find_boxes(steps, None if split == "all" else split)
    names = [box.name for box in boxes]
    where = ", ".join(str(step / "grids.zarr") for step in steps)
    if not boxes:
        raise ValueError(f"{where}: no simulation has the split {split!r}; choose another `split`")
    if twice := repeated(names):
        raise ValueError(f"{where}: {twice[0]!r} is in two stores; predict them in two steps")
    return boxes


def _n_mesh(boxes: Sequence[Box], objective: GridObjective) -> int:
    """The mesh of all boxes; every input and parameter of the model is looked for in each."""
    meshes = {}
    for box in boxes:
        grids = box.open()
        for field in objective.inputs:
            grids.array(field)
        read_parameters(box, objective.simulation_parameters)
        meshes[grids.n_mesh] = box.name
    if len(meshes) > 1:
        raise ValueError(f"meshes differ ({meshes}); predict stores of one n_mesh")
    return next(iter(meshes))


def _check_alike(boxes: Sequence[Box], trained: Mapping[str, Any], model: Path, tells: bool) -> None:
    """Refuse boxes whose fields do not mean what they meant in training (``grids`` of `model.yaml`).

    Another redshift is told of only: a model may be asked what it knows of other times.
    """
    if not trained:
        log.warning("%s does not say what its grids were: they cannot be compared with these", model)
        return
    low, high = trained["cell_size"]
    late, early = trained["redshift"]
    for box in boxes:
        grids = box.open()
        if not low / _CELLS_ALIKE <= grids.cell_size <= high * _CELLS_ALIKE:
            learned = f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"
            n_mesh = round(grids.attrs.box_size / min(max(grids.cell_size, low), high))
            raise ValueError(
                f"{box.name} has cells of {grids.cell_size:.4g} Mpc/h ({grids.attrs.box_size:g} Mpc/h in "
                f"{grids.n_mesh}), but {model} learned from cells of {learned} Mpc/h: ingest it with about "
                f"n_mesh = {n_mesh}, or train on cells of this size"
            )
        for name, facts in trained["fields"].items():
            if name in grids.fields and (given := grids.field(name).assignment) != facts["assignment"]:
                raise ValueError(
                    f"{box.name}: {name} was made with assignment {given!r}, but {model} learned from "
                    f"{facts['assignment']!r}: ingest both with one scheme (`assignment` of the field)"
                )
        if tells and not late <= grids.attrs.redshift <= early:
            log.warning(
                "%s is at redshift %.3g, %s learned from redshifts %.3g to %.3g",
                *(box.name, grids.attrs.redshift, model, late, early),
            )


def _as_learned(field: GridField, trained: Mapping[str, Any]) -> GridField:
    """A predicted field with the units and the assignment scheme of the field that was learned: it has that
    scheme's window, as the truth has."""
    return field.model_copy(update=trained.get("fields", {}).get(field.name.partition("_sample_")[0], {}))


def _slabs(blocks: Sequence[Tile]) -> list[list[Tile]]:
    """Tiles that share their planes: what one rank writes at a time."""
    slabs: dict[int, list[Tile]] = {}
    for tile in blocks:
        slabs.setdefault(tile.origin[0], []).append(tile)
    return list(slabs.values())


def _chunk(n_mesh: int) -> int:
    """Side of the chunks of boxes that are written whole: the store's own where it divides the mesh."""
    return max((side for side in range(4, 65) if not n_mesh % side), default=n_mesh)


def _began(path: Path, checksum: str) -> bool:
    """Whether the store was created for these weights before."""
    try:
        return open_store(path).attrs.get("checkpoint") == checksum
    except StoreError:
        return False
