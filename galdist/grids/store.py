"""The grid store: fields on periodic meshes, as Zarr v3.

One group a simulation, one array a field, dimensions ``(z, y, x)`` or ``(component, z, y, x)`` with the
components in the order x, y, z. The attributes that make a grid a measurement (box size, redshift,
cosmology, sources, split) are those of the group; units and mass-assignment scheme are those of the array.
Cell centers are coordinate arrays ``x``, ``y``, ``z`` in Mpc/h, so that
``xarray.open_zarr(path, group=simulation)`` knows everything.

Who creates a store makes every array of it at once (`create_store`); writers then fill whole chunks that they
alone own, so that no two processes ever touch one file. Statistics of the training simulations come last.
"""

import importlib.util
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import zarr
from numpy.typing import NDArray
from pydantic import Field as Constraint
from pydantic import PositiveFloat, PositiveInt, ValidationError, field_validator, model_validator
from zarr.codecs import ZstdCodec
from zarr.errors import GroupNotFoundError

from galdist.config import StrictModel
from hpc import durable
from hpc.strict import did_you_mean, repeated

if TYPE_CHECKING:
    from galdist.simulations.simulation import Simulation

FORMAT = "galdist-grids"
VERSION = 1
AXES = ("z", "y", "x")

Split = Literal["train", "validation", "test"]
Assignment = Literal["ngp", "cic", "tsc", "none"]
Name = Annotated[str, Constraint(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]


class StoreError(ValueError):
    """A store that is not what it should be, or a name that it does not hold."""


class Source(StrictModel):
    """A file that a simulation's fields were made from."""

    file: str
    size: int
    """Bytes."""
    sha256: str | None = None


class SimulationAttrs(StrictModel):
    """What is known of a simulation besides its fields; the attributes of its group."""

    name: Name
    box_size: PositiveFloat
    """Side of the periodic box [Mpc/h]."""
    redshift: float
    suite: str
    set: str = ""
    split: Split = "train"
    cosmology: dict[str, float] = Constraint(default_factory=dict)
    """Omega_m, Omega_b, h, n_s, sigma_8: those that are known."""
    astrophysics: dict[str, float] = Constraint(default_factory=dict)
    """A_SN1, A_AGN1, A_SN2, A_AGN2 where the suite varies them."""
    seed: int | None = None
    sources: tuple[Source, ...] = ()

    @classmethod
    def of(cls, simulation: "Simulation", split: Split, sources: Sequence[Source] = ()) -> "SimulationAttrs":
        """Those of a simulation that was opened."""
        return cls(
            name=simulation.name,
            box_size=simulation.box_size,
            redshift=simulation.redshift,
            suite=simulation.suite,
            set=simulation.set,
            split=split,
            cosmology=simulation.cosmology,
            astrophysics=simulation.astrophysics,
            seed=simulation.seed,
            sources=tuple(sources),
        )


class Field(StrictModel):
    """A field of a store: its array's name, components, type and units."""

    name: Name
    units: str = ""
    """``""`` for numbers."""
    assignment: Assignment = "none"
    """Scheme by which points became this field; ``none`` for fields that are not mass assignments."""
    components: Literal[1, 3] = 1
    """3 for vectors, in the order x, y, z."""
    dtype: Literal["float32", "float64", "uint8"] = "float32"

    @field_validator("name")
    @classmethod
    def _not_a_coordinate(cls, name: str) -> str:
        if name in AXES:
            raise ValueError(f"{name!r} is the name of a coordinate")
        return name


class FieldStatistics(StrictModel):
    """Moments of a field over all voxels of the training simulations, in the field's units."""

    mean: float
    std: float
    max: float
    nonzero_fraction: float


class Chunking(StrictModel):
    """How the arrays of a store are cut into files.

    The defaults gave the best rate of random 32^3 crops (docs/benchmarks.md). Shards put ``(1, shard/chunk,
    shard/chunk)`` chunks in one file: for meshes so large that their chunks are too many files.
    """

    chunk: Annotated[int, Constraint(ge=4)] = 64
    """Side of a chunk [cells]; it divides the mesh. Meshes smaller than it are one chunk."""
    shard: PositiveInt | None = None
    """Side of a shard along y and x [cells], a multiple of the chunk. Shards are one chunk thick."""
    zstd_level: Annotated[int, Constraint(ge=0, le=22)] = 0
    """0 stores chunks as they are; 1 makes counts of galaxies hundreds of times smaller to read slower."""

    @model_validator(mode="after")
    def _whole_chunks_in_a_shard(self) -> "Chunking":
        if self.shard is not None and self.shard % self.chunk:
            raise ValueError(f"shard ({self.shard}) must be a multiple of chunk ({self.chunk})")
        return self

    def edge(self, n_mesh: int) -> int:
        """Side of the chunks of a mesh of ``n_mesh`` cells a side.

        Raises
        ------
        StoreError
            where chunks or shards do not tile the mesh.
        """
        edge = min(self.chunk, n_mesh)
        for what, side in (("chunk", edge), ("shard", self.shard or edge)):
            if n_mesh % side:
                divisors = [
                    d
                    for d in range(8, n_mesh + 1)
                    if n_mesh % d == 0 and d % (edge if what == "shard" else 1) == 0
                ]
                raise StoreError(
                    f"{what}: {side} does not divide n_mesh = {n_mesh}; choose one of {divisors or [n_mesh]}"
                )
        return edge


class SimulationGrids:
    """The fields of one simulation of a store."""

    def __init__(self, group: zarr.Group) -> None:
        self._group = group
        self._arrays: dict[str, zarr.Array[Any]] = {}
        try:
            self.attrs = SimulationAttrs.model_validate(group.attrs.asdict())
        except ValidationError as error:
            raise StoreError(f"{group.store_path}: {error}") from error

    @property
    def fields(self) -> list[str]:
        """Names of the fields."""
        return sorted(set(self._group.array_keys()) - set(AXES))

    def array(self, field: str) -> "zarr.Array[Any]":
        """The array of ``field``, with index order ``(z, y, x)`` or ``(component, z, y, x)``.

        Raises
        ------
        StoreError
            where the simulation has no such field; the message names those it has.
        """
        if field not in self._arrays:
            if field not in self.fields:
                raise StoreError(unknown_name(f"{self._group.store_path}: field", field, self.fields))
            array = self._group[field]
            assert isinstance(array, zarr.Array)
            self._arrays[field] = array
        return self._arrays[field]

    def field(self, name: str) -> Field:
        """Units, assignment scheme, components and type of the field ``name``."""
        array = self.array(name)
        attrs = array.attrs
        components = array.shape[0] if array.ndim == 4 else 1
        return Field.model_validate(
            {
                "name": name,
                "units": attrs.get("units", ""),
                "assignment": attrs.get("assignment", "none"),
                "components": components,
                "dtype": str(array.dtype),
            }
        )

    @property
    def n_mesh(self) -> int:
        """Cells along each side of the box."""
        array = self._group["x"]
        assert isinstance(array, zarr.Array)
        return int(array.shape[0])

    @property
    def cell_size(self) -> float:
        """Side of a cell [Mpc/h]."""
        return self.attrs.box_size / self.n_mesh

    def read(self, field: str, selection: Any = ...) -> NDArray[Any]:
        """Values of ``field`` in ``selection`` (basic slices, index order of the array), in memory."""
        return np.asarray(self.array(field)[selection])

    def write(self, field: str, values: NDArray[Any], start: int = 0, component: int | None = None) -> None:
        """Fill the planes of ``field`` that begin at z index ``start`` with ``values`` ``([3,] nz, y, x)``.

        The planes must cover whole chunks: two writers then never share a file. They are on the disk when
        this returns: a note that they are done stays true where this machine is lost. ``component`` writes
        one component of a vector field (``values`` is then ``(nz, y, x)``).

        Raises
        ------
        StoreError
            where the planes cut through a chunk, or the shape is not that of the array.
        """
        array = self.array(field)
        thickness = (array.shards or array.chunks)[-3]
        stop = start + values.shape[-3]
        expected = (*array.shape[:-3], stop - start, *array.shape[-2:])
        if component is not None:
            expected = expected[1:]
        if values.shape != expected:
            raise StoreError(f"{array.store_path}: values of shape {values.shape} given, {expected} expected")
        if start % thickness or (stop % thickness and stop != array.shape[-3]) or stop > array.shape[-3]:
            raise StoreError(
                f"{array.store_path}: planes {start}:{stop} are not whole chunks, "
                f"which begin at multiples of {thickness}"
            )
        planes = slice(start, stop)
        if component is None:
            array[..., planes, :, :] = values
        else:
            array[component, planes] = values
        folder = Path(array.store_path.store.root, array.path, "c")  # type: ignore[attr-defined]
        slabs = range(start // thickness, -(-stop // thickness))
        before = "*/" * (array.ndim - 3)  # all components
        files = [file for z in slabs for file in folder.glob(f"{before}{z}/*/*")]
        with ThreadPoolExecutor(16) as threads:  # side by side: one after the other takes six times as long
            list(threads.map(durable.sync_path, files))


class GridStore:
    """A store of fields: a mapping from simulation names to `SimulationGrids`."""

    def __init__(self, path: str | Path, root: zarr.Group) -> None:
        self.path = Path(path)
        self._root = root
        self._simulations: dict[str, SimulationGrids] = {}

    def __getitem__(self, name: str) -> SimulationGrids:
        if name not in self._simulations:
            if name not in self._names():
                raise StoreError(unknown_name(f"{self.path}: simulation", name, self._names()))
            group = self._root[name]
            assert isinstance(group, zarr.Group)
            self._simulations[name] = SimulationGrids(group)
        return self._simulations[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names())

    def __len__(self) -> int:
        return len(self._names())

    def __contains__(self, name: object) -> bool:
        return name in self._names()

    def _names(self) -> list[str]:
        names = self._root.attrs["simulations"]
        assert isinstance(names, list)
        return [str(name) for name in names]

    def names(self, split: Split | None = None) -> list[str]:
        """Names of the simulations, of all splits or of one, in the order in which they were given."""
        return [name for name in self._names() if split is None or self[name].attrs.split == split]

    @property
    def n_mesh(self) -> int:
        """Cells along each side of every box."""
        n_mesh = self._root.attrs["n_mesh"]
        assert isinstance(n_mesh, int)
        return n_mesh

    @property
    def attrs(self) -> dict[str, Any]:
        """Attributes of the store, such as the ``checkpoint`` and ``model`` of a prediction."""
        return self._root.attrs.asdict()

    @property
    def statistics(self) -> dict[str, FieldStatistics]:
        """Statistics of every field over the training simulations.

        Raises
        ------
        StoreError
            where they are not there: the store was not finished, or holds no training simulation.
        """
        statistics = self._root.attrs.get("statistics")
        if not isinstance(statistics, dict):
            raise StoreError(
                f"{self.path}: attribute 'statistics' is missing: the store is unfinished, or no simulation "
                "of it is in the training split"
            )
        return {name: FieldStatistics.model_validate(values) for name, values in statistics.items()}

    def write_statistics(self, statistics: Mapping[str, FieldStatistics]) -> None:
        """Record the statistics of the training simulations; the last thing that is written."""
        self._root.attrs["statistics"] = {name: values.model_dump() for name, values in statistics.items()}

    def write_sources(self, sources: Mapping[str, Sequence[Source]]) -> None:
        """Record the files that the fields of each simulation were made from."""
        for simulation, files in sources.items():
            group = self._root[simulation]
            assert isinstance(group, zarr.Group)
            group.attrs["sources"] = [file.model_dump() for file in files]
        self._root = consolidate(self._root)
        self._simulations.clear()


def create_store(
    path: str | Path,
    simulations: Iterable[SimulationAttrs],
    fields: Iterable[Field],
    n_mesh: int,
    chunking: Chunking | None = None,
    attrs: Mapping[str, Any] | None = None,
) -> GridStore:
    """Create a store with every array of it, all zero; whatever was at ``path`` goes.

    Parameters
    ----------
    path
        the store's folder, such as ``out / "grids.zarr"``.
    simulations
        one group each.
    fields
        arrays of every group.
    n_mesh
        cells along each side of every box.
    chunking
        chunk sides and compression; the defaults are the fastest for random crops.
    attrs
        further attributes of the store (a prediction's ``checkpoint`` and ``model``).

    Raises
    ------
    StoreError
        where chunks do not tile the mesh, two simulations or fields have the same name, or either is absent.
    """
    chunking = chunking or Chunking()
    simulations, fields = list(simulations), list(fields)
    edge = chunking.edge(n_mesh)
    for what, given in (("simulation", [s.name for s in simulations]), ("field", [f.name for f in fields])):
        if not given:
            raise StoreError(f"{path}: a store needs at least one {what}")
        if twice := repeated(given):
            raise StoreError(f"{path}: {what} {twice[0]!r} is given twice")
    use_zarrs()
    root = zarr.create_group(path, zarr_format=3, overwrite=True)
    for simulation in simulations:
        group = root.create_group(simulation.name, attributes=simulation.model_dump(mode="json"))
        centers = (np.arange(n_mesh) + 0.5) * simulation.box_size / n_mesh
        for axis in AXES:
            coordinate = group.create_array(
                axis,
                shape=(n_mesh,),
                chunks=(n_mesh,),
                dtype="float64",
                dimension_names=(axis,),
                attributes={"units": "Mpc/h", "long_name": f"{axis} of the cell centers"},
            )
            coordinate[:] = centers
        for field in fields:
            vector = field.components > 1
            shard = (edge, chunking.shard, chunking.shard) if chunking.shard else None
            group.create_array(
                field.name,
                shape=((field.components,) if vector else ()) + (n_mesh,) * 3,
                chunks=((1,) if vector else ()) + (edge,) * 3,
                shards=None if shard is None else ((1,) if vector else ()) + shard,
                dtype=field.dtype,
                compressors=ZstdCodec(level=chunking.zstd_level) if chunking.zstd_level else None,
                fill_value=0,
                dimension_names=(("component",) if vector else ()) + AXES,
                attributes={"field": field.name, "units": field.units, "assignment": field.assignment},
            )
    # Last, so that a store whose creation was cut short does not open.
    root.update_attributes(
        {
            **(attrs or {}),
            "format": FORMAT,
            "version": VERSION,
            "n_mesh": n_mesh,
            "simulations": [simulation.name for simulation in simulations],
        }
    )
    consolidate(root)
    return open_store(path, mode="r+")


def open_store(path: str | Path, mode: Literal["r", "r+"] = "r") -> GridStore:
    """Open the store at ``path``; ``r+`` to fill it.

    Raises
    ------
    StoreError
        where there is no store, or it is of another format or version.
    """
    where = "the stage that writes it leaves a folder that ends in .zarr"
    return GridStore(path, open_root(path, "grid store", FORMAT, VERSION, where, mode))


def open_root(
    path: str | Path, kind: str, form: str, version: int, where: str, mode: Literal["r", "r+"] = "r"
) -> zarr.Group:
    """Open the root group of a store and check that it is one of its kind, and whole.

    Parameters
    ----------
    kind
        what the store is called.
    form, version
        its attributes ``format`` and ``version``, which are written last.
    where
        what to say to those who look for it in the wrong place.

    Raises
    ------
    StoreError
        where there is no store, it is unfinished, or of another format or version.
    """
    use_zarrs()
    try:
        root = zarr.open_group(path, mode=mode, zarr_format=3)
    except (FileNotFoundError, GroupNotFoundError) as error:
        raise StoreError(f"{path}: no {kind} here; {where}") from error
    for key, expected in (("format", form), ("version", version)):
        if (found := root.attrs.get(key)) != expected:
            raise StoreError(
                f"{path}: {key} is {found!r}, expected {expected!r}"
                + ("" if found is not None else f": it is no {kind}, or it was not finished")
            )
    return root


def consolidate(root: zarr.Group) -> zarr.Group:
    """Put a copy of all metadata into the root's, so that a store of many simulations opens fast."""
    with warnings.catch_warnings():
        # An extension of Zarr v3 so far: a reader that does not know it reads the metadata of each array.
        warnings.filterwarnings("ignore", message="Consolidated metadata is currently not part")
        return zarr.consolidate_metadata(root.store)


def use_zarrs() -> None:
    """Encode and decode chunks with the zarrs (Rust) pipeline where it is installed: about twice as fast."""
    if importlib.util.find_spec("zarrs") is not None:
        zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})


def unknown_name(what: str, name: str, known: Sequence[str]) -> str:
    """The message for a name that is not among those known."""
    return f"{what} {name!r} is not there{did_you_mean(name, known)} It has: {', '.join(known) or 'none'}"
