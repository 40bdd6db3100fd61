"""Samples for torch from grid stores: random periodic crops for training, tiles with halos for whole boxes.

What a sample is depends on ``(seed, epoch, index)`` alone, never on the rank or worker that makes it: any
number of ranks trains on the same batches, and a resumed run sees what it would have seen.

A batch is a dict: one float32 tensor ``(batch, component, z, y, x)`` a field, in the field's own units;
``halo``, the number of voxels at each face that are context only (no loss, no prediction); ``periodic``,
whether the batch holds whole boxes, whose opposite faces touch; and, for models that are conditioned on
parameters of the simulation, ``parameters``, float32 ``(batch, parameter)``. In training, ``seed``
``(batch,)`` numbers the samples of an epoch in their order, from a start of its own on, for models that draw.
"""

import contextlib
import math
import os
import shutil
import signal
import socket
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from dataclasses import dataclass
from itertools import product
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from galdist.config import StrictModel
from galdist.data import Batch, share, steps_to_read
from galdist.data.transforms import N_SYMMETRIES, cube_symmetry
from galdist.grids.store import SimulationGrids, Split, StoreError, open_store, unknown_name
from galdist.models import GridObjective, Objective
from hpc import ddp, durable

PARAMETERS = "parameters"
"""What a batch calls the parameters of its simulations."""
SEED = "seed"
"""What a batch calls the numbers that its samples' own noise is drawn from."""


class Mesh(Protocol):
    """A field ``([3,] z, y, x)`` on a cubic mesh, in memory or not: NumPy and Zarr arrays are such."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, selection: Any, /) -> Any: ...


class CropsConfig(StrictModel):
    """Random periodic crops of the training boxes, each under one of the cube's 48 symmetries."""

    kind: Literal["crops"] = "crops"
    crop: PositiveInt = 32
    """Side of a crop [cells]; a multiple of what the network halves. The whole mesh is a crop too, a periodic
    one."""
    margin: NonNegativeInt = 0
    """Cells at each face of a crop that the network sees but that carry no loss: there it lacks its
    surroundings."""
    crops_per_box: PositiveInt = 16
    """Crops of each training box in an epoch."""
    cache_gib: PositiveFloat = 8.0
    """Bound on the decoded boxes kept on the disk of each node [GiB]. Where all boxes exceed it, an epoch
    goes through them in groups of half of it, in an order that changes from epoch to epoch."""
    workers: NonNegativeInt = 1
    """Processes a rank that make batches; 0 makes them in the training process."""
    tile: PositiveInt = 64
    """Side of the tiles in which validation boxes are predicted [cells]."""
    halo: NonNegativeInt | None = None
    """Cells read around such a tile. By default the model's reach, which makes tiles exact."""

    @model_validator(mode="after")
    def _leave_an_interior(self) -> "CropsConfig":
        if 2 * self.margin >= self.crop:
            raise ValueError(
                f"margin {self.margin} leaves nothing of crop {self.crop}; it must be below half of it"
            )
        return self

    def open(self, objective: Objective, inputs: Mapping[str, list[Path]], scratch: Path) -> "GridData":
        """The boxes of the steps under the role ``grids`` for a model of grids.

        Parameters
        ----------
        scratch
            folder for what is kept while training; absent until then.

        Raises
        ------
        ValueError
            where model, boxes and these settings do not fit each other.
        """
        assert isinstance(objective, GridObjective)
        steps = steps_to_read("grids", inputs, objective.config.name)
        return GridData(
            self,
            steps,
            objective.fields,
            scratch,
            objective.alignment,
            objective.reach,
            objective.simulation_parameters,
        )


class Box(NamedTuple):
    """A simulation of a grid store."""

    store: str
    name: str

    def open(self) -> SimulationGrids:
        return open_store(self.store)[self.name]


def find_boxes(steps: Sequence[Path], split: Split | None) -> list[Box]:
    """The simulations of ``split`` (None: of all splits) in the grid stores of step folders, in the order of
    steps and stores."""
    stores = [step / "grids.zarr" for step in steps]
    return [Box(str(store), name) for store in stores for name in open_store(store).names(split)]


def read_parameters(box: Box, names: Sequence[str]) -> NDArray[np.float32]:
    """Parameters (p,) of a simulation: of its cosmology or astrophysics, or its ``redshift``.

    Raises
    ------
    galdist.grids.store.StoreError
        where its store does not know one; the message names those that it knows.
    """
    attrs = box.open().attrs
    known = {"redshift": attrs.redshift} | attrs.cosmology | attrs.astrophysics
    for name in names:
        if name not in known:
            what = f"{box.store}: simulation {box.name}: parameter"
            raise StoreError(unknown_name(what, name, list(known)))
    return np.array([known[name] for name in names], np.float32)


def periodic_crop(mesh: Mesh, origin: Sequence[int], shape: Sequence[int]) -> NDArray[np.float32]:
    """A block ``(component, z, y, x)`` of a periodic mesh; it may leave the mesh on any side, and exceed it.

    Parameters
    ----------
    mesh
        the field, with or without leading components; only what the block needs is read of it.
    origin, shape
        first cell and size of the block along z, y, x.
    """
    n_mesh = mesh.shape[-1]
    pieces = [_wrap(start % n_mesh, size, n_mesh) for start, size in zip(origin, shape, strict=True)]
    crop: NDArray[np.float32] | None = None
    for blocks in product(*pieces):
        values = np.asarray(mesh[(..., *(source for source, _ in blocks))])
        values = values.reshape(-1, *values.shape[-3:])
        if crop is None:
            crop = np.empty((len(values), *shape), np.float32)
        crop[(slice(None), *(target for _, target in blocks))] = values
    assert crop is not None
    return crop


def _wrap(start: int, size: int, n_mesh: int) -> list[tuple[slice, slice]]:
    """Runs of a periodic axis that make up ``start .. start + size``: where each lies in the mesh and in the
    block."""
    runs, done = [], 0
    while done < size:
        length = min(size - done, n_mesh - start)
        runs.append((slice(start, start + length), slice(done, done + length)))
        start, done = 0, done + length
    return runs


@dataclass(frozen=True)
class Tile:
    """A block of a periodic mesh to predict, and the halo that must be read around it."""

    origin: tuple[int, int, int]
    shape: tuple[int, int, int]
    halo: int
    periodic: bool
    """Whether the block is the whole mesh."""

    @property
    def interior(self) -> tuple[slice, slice, slice]:
        """Where the block lies in the mesh."""
        z, y, x = (slice(start, start + size) for start, size in zip(self.origin, self.shape, strict=True))
        return z, y, x

    def batch(self, fields: Mapping[str, Mesh], parameters: NDArray[np.float32] | None = None) -> Batch:
        """The block of every field with its halo, as a batch of one; with the simulation's ``parameters``
        (p,), where there are any."""
        origin = [start - self.halo for start in self.origin]
        shape = [size + 2 * self.halo for size in self.shape]
        batch: Batch = {"halo": self.halo, "periodic": self.periodic}
        for field, mesh in fields.items():
            batch[field] = torch.from_numpy(periodic_crop(mesh, origin, shape))[None]
        if parameters is not None and len(parameters):
            batch[PARAMETERS] = torch.from_numpy(parameters)[None]
        return batch


def tiles(n_mesh: int, side: int, halo: int, alignment: int) -> list[Tile]:
    """Cut a periodic mesh into blocks of ``side`` cells (smaller at the end) with halos, in order z, y, x.

    Origins and halos are multiples of ``alignment``, so that pooling cells are those of the whole mesh. Where
    a block with its halo would be as large as the mesh, the mesh itself is the only tile.

    Raises
    ------
    ValueError
        where the mesh or the blocks are no multiple of the alignment.
    """
    for what, cells in (("n_mesh", n_mesh), ("tile", side)):
        if cells % alignment:
            raise ValueError(
                f"{what} is {cells}: this network halves its mesh, so it must be a multiple of {alignment}"
            )
    halo = math.ceil(halo / alignment) * alignment
    if side + 2 * halo >= n_mesh:
        return [Tile((0, 0, 0), (n_mesh,) * 3, 0, periodic=True)]
    starts = range(0, n_mesh, side)
    return [
        Tile(
            (z, y, x),
            (min(side, n_mesh - z), min(side, n_mesh - y), min(side, n_mesh - x)),
            halo,
            periodic=False,
        )
        for z, y, x in product(starts, repeat=3)
    ]


class BoxCache:
    """Decoded boxes as memory-mapped files, shared by all processes of a node.

    Whoever needs a box first decodes it; two processes that do so at once write the same bytes. Crops then
    cost a copy from the page cache (25,000/s of 32^3 against 1,000/s from a compressed store).
    """

    def __init__(self, folder: Path, boxes: Sequence[Box], most_open: int) -> None:
        # One folder a node: the step folder may be on a file system that other nodes see, with process ids of
        # theirs.
        self.folder = folder / socket.gethostname()
        self.boxes = list(boxes)
        self.most_open = most_open
        self._open: OrderedDict[tuple[int, str], NDArray[Any]] = OrderedDict()

    def load(self, box: int, field: str) -> NDArray[Any]:
        """Field of ``boxes[box]`` in its store's index order; decodes it where no process has yet."""
        if (box, field) in self._open:
            self._open.move_to_end((box, field))
            return self._open[box, field]
        path = self._path(box, field)
        try:
            values = np.load(path, mmap_mode="r")
        except FileNotFoundError:
            values = self.boxes[box].open().read(field)
            what = f"box {self.boxes[box].name}, decoded (data.cache_gib bounds what is kept)"
            with (
                durable.room_for(what, self.folder),
                durable.atomic_path(path) as temporary,
                open(temporary, "wb") as stream,
            ):
                header = np.lib.format.header_data_from_array_1_0(values)
                np.lib.format.write_array_header_1_0(stream, header)
                stream.write(values.data)  # `np.save` does not say that a disk is full
            with contextlib.suppress(FileNotFoundError):  # another rank is already done with it
                values = np.load(path, mmap_mode="r")
        self._open[box, field] = values
        while len({box for box, _ in self._open}) > self.most_open:
            self._open.popitem(last=False)
        return values

    def keep(self, boxes: Sequence[int]) -> None:
        """Remove the files of all other boxes. Who still reads one keeps what it has mapped."""
        kept = {self._path(box, "*").name.split("-")[0] for box in boxes}
        for path in self.folder.glob("*.npy"):
            if path.name.split("-")[0] not in kept:
                path.unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove the files of all nodes, also of those that an earlier start of the job was on."""
        shutil.rmtree(self.folder.parent, ignore_errors=True)

    @property
    def nbytes(self) -> int:
        """Size of this node's files."""
        return durable.folder_size(self.folder)

    def _path(self, box: int, field: str) -> Path:
        return self.folder / f"{box:06d}-{field}.npy"


class CropIndex(NamedTuple):
    """Names a training sample."""

    epoch: int
    sample: int
    """Place in the epoch."""
    box: int


class CropDataset(Dataset[dict[str, NDArray[Any]]]):
    """Random crops, by `CropIndex`: origin and symmetry are drawn from ``(seed, epoch, sample)``.

    ``parameters`` are those of each box of the cache, (p,); none by default.
    """

    def __init__(
        self,
        cache: BoxCache,
        fields: Sequence[str],
        crop: int,
        n_mesh: int,
        seed: int,
        parameters: Sequence[NDArray[np.float32]] = (),
    ) -> None:
        self.cache = cache
        self.fields = list(fields)
        self.crop = crop
        self.n_mesh = n_mesh
        self.seed = seed
        self.parameters = list(parameters)

    def __getitem__(self, index: CropIndex) -> dict[str, NDArray[Any]]:
        random = np.random.default_rng([self.seed, index.epoch, index.sample])
        origin = random.integers(self.n_mesh, size=3).tolist()
        symmetry = int(random.integers(N_SYMMETRIES))
        first = np.random.default_rng([self.seed, index.epoch]).integers(2**31)
        sample: dict[str, NDArray[Any]] = {SEED: np.asarray(first + index.sample)}
        for field in self.fields:
            values = self.cache.load(index.box, field)
            crop = periodic_crop(values, origin, (self.crop,) * 3)
            sample[field] = cube_symmetry(crop, symmetry)
        if self.parameters:
            sample[PARAMETERS] = self.parameters[index.box]
        return sample


class CropSampler(Sampler[list[CropIndex]]):
    """This rank's part of every batch of an epoch, from a position on.

    An epoch shuffles the boxes, goes through them in windows of as many as the cache holds, and shuffles the
    crops of each window. Sample ``i`` belongs to step ``i // batch_size`` whatever the number of ranks.

    Parameters
    ----------
    n_boxes, crops_per_box
        samples of an epoch; those that do not fill a batch are left out.
    window
        boxes that are decoded at one time.
    batch_size
        samples of a step, over all ranks.
    parts
        parts of a step on each rank (gradient accumulation).
    on_window
        called with the boxes that a window and the one before it need, as the window begins.
    """

    def __init__(
        self,
        n_boxes: int,
        crops_per_box: int,
        window: int,
        batch_size: int,
        parts: int,
        rank: int,
        world_size: int,
        seed: int,
        on_window: Callable[[Sequence[int]], None] | None = None,
    ) -> None:
        self.n_boxes, self.crops_per_box, self.window = n_boxes, crops_per_box, window
        self.batch_size, self.parts, self.rank, self.world_size = batch_size, parts, rank, world_size
        self.seed = seed
        self.on_window = on_window
        self.epoch = self.first_step = 0
        self.steps = n_boxes * crops_per_box // batch_size
        """Steps in an epoch."""

    def start_at(self, epoch: int, step: int) -> None:
        """Where the next iteration begins; those after it begin where they are told."""
        self.epoch, self.first_step = epoch, step

    def order(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The box of every sample of the epoch, and the boxes as the windows take them."""
        random = np.random.default_rng([self.seed, self.epoch])
        boxes = random.permutation(self.n_boxes)
        order = []
        for start in range(0, self.n_boxes, self.window):
            crops = np.repeat(boxes[start : start + self.window], self.crops_per_box)
            order.append(random.permutation(crops))
        return np.concatenate(order), boxes

    def __iter__(self) -> Iterator[list[CropIndex]]:
        epoch = self.epoch
        order, boxes = self.order()
        size = self.batch_size // (self.parts * self.world_size)
        entered = -1
        for step in range(self.first_step, self.steps):
            last = (step + 1) * self.batch_size - 1
            window = last // (self.window * self.crops_per_box)
            if window != entered and self.on_window is not None and self.window < self.n_boxes:
                self.on_window(boxes[max(window - 1, 0) * self.window : (window + 1) * self.window].tolist())
                entered = window
            for part in range(self.parts):
                start = step * self.batch_size + (part * self.world_size + self.rank) * size
                yield [CropIndex(epoch, sample, int(order[sample])) for sample in range(start, start + size)]

    def __len__(self) -> int:
        return (self.steps - self.first_step) * self.parts


class _Collate:
    """Stacks samples into a batch; a class, so that it can be sent to workers."""

    def __init__(self, halo: int, periodic: bool) -> None:
        self.halo, self.periodic = halo, periodic

    def __call__(self, samples: list[dict[str, NDArray[Any]]]) -> Batch:
        batch: Batch = {
            field: torch.from_numpy(np.stack([s[field] for s in samples])) for field in samples[0]
        }
        return {**batch, "halo": self.halo, "periodic": self.periodic}


class TrainingBatches:
    """This rank's batches, step by step, made ahead by worker processes.

    A batch that is slow to come (its boxes are decoded first) does not hold up the rank: `wait` returns in
    between, for the ranks to agree whether to go on.
    """

    def __init__(self, loader: "DataLoader[Batch]", sampler: CropSampler) -> None:
        self._loader, self._sampler = loader, sampler
        self._iterator: Iterator[Batch] = iter(())
        self._next: futures.Future[list[Batch]] | None = None

    @property
    def steps(self) -> int:
        """Steps in an epoch."""
        return self._sampler.steps

    def start_at(self, epoch: int, step: int) -> None:
        """Begin to make the batches of an epoch, from a step on; all of those asked for before are taken."""
        self._sampler.start_at(epoch, step)
        with _signals_left_to_the_rank():
            self._iterator = iter(self._loader)

    def wait(self, seconds: float) -> bool:
        """Whether the batches of the next step are there, after waiting for them for so long at most."""
        if self._next is None:
            self._next = futures.Future()
            threading.Thread(target=self._make, args=(self._next,), daemon=True).start()
        return bool(futures.wait([self._next], seconds).done)

    def take(self) -> list[Batch]:
        """The batches of the next step, one for each of its parts."""
        assert self._next is not None
        batches = self._next.result()
        self._next = None
        return batches

    def _make(self, made: "futures.Future[list[Batch]]") -> None:
        try:
            made.set_result([next(self._iterator) for _ in range(self._sampler.parts)])
        except BaseException as error:  # noqa: BLE001 - `take` raises it
            made.set_exception(error)


@contextlib.contextmanager
def _signals_left_to_the_rank() -> Iterator[None]:
    """Processes that start inside never see SIGTERM and SIGINT.

    Whoever stops a job signals all of its processes: the rank saves its work and then ends its workers.
    """
    resource_tracker.ensure_running()  # which lets these signals through as it starts
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_when_the_rank_says(worker: int) -> None:
    """In a worker, where SIGTERM is blocked: end when it comes from the rank, which waits for that to end
    itself."""

    def listen() -> None:
        while signal.sigwaitinfo((signal.SIGTERM,)).si_pid != os.getppid():
            continue
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()


class GridData:
    """The training and validation boxes of grid stores.

    Parameters
    ----------
    steps
        step folders that hold a `grids.zarr`.
    fields
        the fields that the model reads.
    cache_folder
        where decoded boxes are kept while training.
    alignment, reach, parameters
        of the model: see `galdist.models.GridObjective`.

    Raises
    ------
    ValueError
        where there are no training or validation boxes, meshes differ, a field or a parameter is missing, or
        the crop does not fit mesh or network.
    """

    def __init__(
        self,
        config: CropsConfig,
        steps: Sequence[Path],
        fields: Sequence[str],
        cache_folder: Path,
        alignment: int = 1,
        reach: int = 0,
        parameters: Sequence[str] = (),
    ) -> None:
        self.config = config
        self.fields = tuple(fields)
        self.parameters = tuple(parameters)
        self.training = find_boxes(steps, "train")
        self.validation = find_boxes(steps, "validation")
        where = ", ".join(str(step / "grids.zarr") for step in steps)
        for split, boxes in (("train", self.training), ("validation", self.validation)):
            if not boxes:
                raise ValueError(
                    f"{where}: no simulation has the split {split!r}; name some in the ingest step's split"
                )
        grids = [box.open() for box in (*self.training, *self.validation)]
        meshes = {simulation.n_mesh: simulation.attrs.name for simulation in grids}
        if len(meshes) > 1:
            raise ValueError(f"{where}: meshes differ ({meshes}); train on stores of one n_mesh")
        self.n_mesh = next(iter(meshes))
        for what, cells in (("data.crop", config.crop), ("data.tile", config.tile), ("n_mesh", self.n_mesh)):
            if cells % alignment:
                raise ValueError(
                    f"{what} is {cells}: this network halves its mesh, so it must be a multiple of "
                    f"{alignment}"
                )
        self._tiles = tiles(
            self.n_mesh, config.tile, reach if config.halo is None else config.halo, alignment
        )
        for simulation in grids:
            for field in self.fields:
                simulation.array(field)
        for box in (*self.training, *self.validation):
            read_parameters(box, self.parameters)
        if config.crop > self.n_mesh:
            raise ValueError(
                f"data.crop is {config.crop}, larger than the mesh of {self.n_mesh} cells ({where})"
            )
        self.periodic = config.crop == self.n_mesh
        if self.periodic and config.margin:
            raise ValueError(
                f"data.margin is {config.margin} but crops are whole boxes, which lack no surroundings: "
                "set it to 0"
            )
        box_bytes = sum(grids[0].array(field).nbytes for field in self.fields)
        budget = int(config.cache_gib * 2**30)
        self.window = len(self.training)
        if box_bytes * len(self.training) > budget:
            self.window = min(
                self.window, max(1, budget // (2 * box_bytes))
            )  # the window before may still be read
        n_cached = min(2 * self.window, len(self.training))
        self.cache = BoxCache(cache_folder, self.training, most_open=2 * self.window)
        durable.require_space(
            cache_folder,
            n_cached * box_bytes - self.cache.nbytes,
            f"{n_cached} decoded boxes (data.cache_gib bounds them)",
        )

    def sampler(self, group: ddp.Group, batch_size: int, parts: int, seed: int) -> CropSampler:
        """The order of the training samples.

        Raises
        ------
        ValueError
            where ``batch_size`` cannot be shared by ``parts`` on every rank, or exceeds an epoch.
        """
        share(batch_size, parts, group.world_size)
        sampler = CropSampler(
            len(self.training),
            self.config.crops_per_box,
            self.window,
            batch_size,
            parts,
            group.rank,
            group.world_size,
            seed,
            on_window=self.cache.keep if group.local_rank == 0 else None,
        )
        if sampler.steps == 0:
            raise ValueError(
                f"an epoch has {len(self.training)} boxes x {self.config.crops_per_box} crops, fewer than "
                f"the batch_size of {batch_size}: raise data.crops_per_box"
            )
        return sampler

    def batches(self, group: ddp.Group, batch_size: int, parts: int, seed: int) -> TrainingBatches:
        """Batches of the training samples in the order of `sampler`, which raises for what does not fit."""
        sampler = self.sampler(group, batch_size, parts, seed)
        workers = self.config.workers
        # Spawned, not forked: the store's decoder has threads, which a fork does not copy.
        processes: dict[str, Any] = (
            {"multiprocessing_context": "spawn", "persistent_workers": True, "prefetch_factor": 4}
            if workers
            else {}
        )
        loader: DataLoader[Batch] = DataLoader(
            CropDataset(
                self.cache,
                self.fields,
                self.config.crop,
                self.n_mesh,
                seed,
                [read_parameters(box, self.parameters) for box in self.training] if self.parameters else (),
            ),
            batch_sampler=sampler,
            collate_fn=_Collate(self.config.margin, self.periodic),
            num_workers=workers,
            worker_init_fn=_end_when_the_rank_says,
            # Its own, so that starting an epoch draws nothing from the generator that models use.
            generator=torch.Generator(),
            pin_memory=group.device.type == "cuda",
            **processes,
        )
        return TrainingBatches(loader, sampler)

    def training_fields(self, field: str) -> Iterator[NDArray[Any]]:
        """``field`` of every training box, one at a time; of one of the parameters the value, (1,)."""
        for box in self.training:
            yield read_parameters(box, [field]) if field in self.parameters else box.open().read(field)

    def validation_batches(self, group: ddp.Group, done: int = 0) -> Iterator[Batch | None]:
        """The validation boxes in rounds: a tile for each rank, None for those that the last round leaves
        out.

        All together cover every voxel once. The first ``done`` tiles are left out.
        """
        blocks = self._tiles
        held: int | None = None
        whole: dict[str, Mesh] = {}
        parameters = np.empty(0, np.float32)
        n_tiles = len(self.validation) * len(blocks)
        for first in range(done, n_tiles, group.world_size):
            box, tile = divmod(first + group.rank, len(blocks))
            if box >= len(self.validation):
                yield None
                continue
            if box != held:
                grids = self.validation[box].open()
                whole = {field: grids.read(field) for field in self.fields}
                parameters = read_parameters(self.validation[box], self.parameters)
                held = box
            yield blocks[tile].batch(whole, parameters)

    def close(self) -> None:
        """Training is done: remove the decoded boxes."""
        self.cache.remove()


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on ``device``; seeds stay where they can be read without waiting for it."""
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) and name != SEED else value
        for name, value in batch.items()
    }
