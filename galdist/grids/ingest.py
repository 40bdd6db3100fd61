"""Stage ``ingest``: particles and galaxies of simulations become fields on meshes, in a grid store.

Matter is that of the simulations, of other runs of the same initial conditions, or of all particles with mass
(`galdist.grids.matter`). Two kinds of Dask tasks, each the only writer of its files:

- *scatter*, one for each chunk of a snapshot: reads it in parts and writes its particles to the step's
scratch
  folder, grouped by the slab of planes (one chunk of the store thick) that they give to;
- *paint*, one for each slab of a simulation: reads its particles from all scattered files, assigns them to
a mesh of
  float64 and writes the slab's chunks to the store.

No task holds more than parts of a chunk and one slab of one field, whatever the size of the simulation.
Sums do not depend on the order of particles (`galdist.grids.mass_assignment`), so neither on files, workers
or their deaths. A task that is done leaves a mark; an ingest that was killed continues with the tasks that
are not.
"""

import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import numba
import numpy as np
from numpy.typing import NDArray
from pydantic import Field as Constraint
from pydantic import model_validator

from galdist.config import StrictModel
from galdist.grids.mass_assignment import REACH, Scheme, assign
from galdist.grids.matter import MatterConfig, with_matter
from galdist.grids.store import (
    Chunking,
    Field,
    FieldStatistics,
    GridStore,
    SimulationAttrs,
    Source,
    Split,
    StoreError,
    create_store,
    open_store,
    unknown_name,
)
from galdist.simulations.lattice import Lattice, find_lattice
from galdist.simulations.simulation import (
    ALL_MATTER,
    DARK_MATTER,
    SelectionConfig,
    Simulation,
    SimulationError,
)
from hpc import cluster, durable, progress

log = logging.getLogger(__name__)

Tracer = Literal["particles", "all_matter", "lattice", "true_lattice", "galaxies"]
FieldName = Literal[
    "matter_counts",
    "matter_mass",
    "matter_momentum",
    "matter_velocity",
    "displacement",
    "true_displacement",
    "galaxy_counts",
    "stellar_mass",
]

_PART = 1 << 19  # particles that a task holds at a time
_BLOCK = 8  # rows of cells, along z and y, that particles are grouped by within a slab


_Carries = Literal["number", "mass", "momentum", "velocity", "displacement"]


@dataclass(frozen=True)
class _Kind:
    """What a standard field is made of."""

    tracer: Tracer
    units: str = ""
    carries: _Carries = "number"
    scheme: Scheme = "cic"

    @property
    def components(self) -> Literal[1, 3]:
        return 1 if self.carries in ("number", "mass") else 3


KINDS: dict[FieldName, _Kind] = {
    "matter_counts": _Kind("particles"),
    "matter_mass": _Kind("particles", "Msun/h", "mass"),
    "matter_momentum": _Kind("particles", "Msun/h km/s", "momentum"),
    "matter_velocity": _Kind("particles", "km/s", "velocity"),
    "displacement": _Kind("lattice", "Mpc/h", "displacement", "ngp"),
    "true_displacement": _Kind("true_lattice", "Mpc/h", "displacement", "ngp"),
    "galaxy_counts": _Kind("galaxies", scheme="ngp"),
    "stellar_mass": _Kind("galaxies", "Msun/h", "mass", "ngp"),
}


_COLUMNS: dict[_Carries, tuple[str, ...]] = {
    "number": ("position",),
    "mass": ("position", "mass"),
    "momentum": ("position", "mass", "velocity"),
    "velocity": ("position", "mass", "velocity"),
    "displacement": ("position", "displacement"),
}


class FieldConfig(StrictModel):
    """A field to make."""

    name: FieldName
    assignment: Scheme | None = None
    """By default CIC for matter and NGP for galaxies."""

    @property
    def scheme(self) -> Scheme:
        """The scheme to use."""
        return self.assignment or KINDS[self.name].scheme

    @model_validator(mode="after")
    def _lattices_have_no_scheme(self) -> "FieldConfig":
        if self.assignment is not None and KINDS[self.name].carries == "displacement":
            raise ValueError(
                f"{self.name} is not assigned to a mesh, it is of a lattice: leave assignment out"
            )
        return self


class IngestConfig(SelectionConfig):
    """Which simulations become which fields."""

    matter_of: MatterConfig | None = None
    """Other runs of the same initial conditions whose matter takes the place of the simulations' own, such as
    COLA. A step under the role ``matter`` says the same."""
    n_mesh: Annotated[int, Constraint(ge=4)] = 256
    """Cells along each side of the box."""
    fields: tuple[FieldConfig, ...] = (FieldConfig(name="matter_counts"), FieldConfig(name="galaxy_counts"))
    min_stellar_mass: Annotated[float, Constraint(ge=0)] = 1.3e8
    """Least mass in stars of a subhalo that counts as a galaxy [Msun/h]."""
    chunking: Chunking = Chunking()
    checksums: bool = True
    """Record the SHA-256 of every source file, which reads each once more; sizes are recorded anyway."""

    @model_validator(mode="after")
    def _fields_and_chunks_fit(self) -> "IngestConfig":
        names = [field.name for field in self.fields]
        if not names:
            raise ValueError(f"fields: name at least one of {', '.join(KINDS)}")
        if len(set(names)) < len(names):
            raise ValueError(f"fields: each may stand once, got {', '.join(names)}")
        self.chunking.edge(self.n_mesh)
        return self

    def require(self, names: Sequence[str], step: str) -> None:
        """See `galdist.config.Leaves`."""
        known = [field.name for field in self.fields]
        for name in names:
            if name not in known:
                raise ValueError(unknown_name(f"step {step}: field", name, known))


@dataclass(frozen=True)
class _Job:
    """What the tasks of one tracer of one simulation need to know."""

    simulation: Simulation
    tracer: Tracer
    fields: tuple[FieldConfig, ...]
    n_mesh: int
    thickness: int
    """Planes of a slab."""
    min_stellar_mass: float
    checksums: bool
    store: Path
    scratch: Path
    lattice: Lattice | None = None
    """Of the particles, where it is their displacements that are wanted."""

    @property
    def files(self) -> tuple[Path, ...]:
        """What scatter tasks read: chunks of a snapshot one by one, a group catalogue at once."""
        return self.simulation.group_files[:1] if self.tracer == "galaxies" else self.source.particle_files

    @property
    def source(self) -> Simulation:
        """The run whose files are read."""
        return self.simulation if self.tracer in ("galaxies", "true_lattice") else self.simulation.matter

    @property
    def kinds(self) -> tuple[int, ...]:
        """Types of the particles."""
        return ALL_MATTER if self.tracer == "all_matter" else (DARK_MATTER,)

    @property
    def n_slabs(self) -> int:
        return self.n_mesh // self.thickness

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of a particle that the fields need."""
        return max((_COLUMNS[KINDS[field.name].carries] for field in self.fields), key=len)

    def scattered(self, index: int) -> Path:
        """Particles of file ``index``; the mark beside it (.json) says where in it they are."""
        return self.scratch / self.simulation.name / f"{self.tracer}.{index}.bin"

    def painted(self, slab: int) -> Path:
        """Mark of a slab that is in the store, with its statistics."""
        return self.scratch / self.simulation.name / f"{self.tracer}.slab{slab}.json"


def ingest(config: IngestConfig, inputs: Mapping[str, list[Path]], out: Path) -> None:
    """Make ``out / "grids.zarr"`` from simulation files; see `galdist.grids.store` for its schema.

    Counts are the same to the last bit whatever the number of workers and files, masses and momenta to 1e-6.

    Raises
    ------
    galdist.simulations.simulation.SimulationError
        for files that are absent, damaged, incomplete or not what they should be.
    hpc.durable.NotEnoughSpace
        before work starts, where the disk cannot take the store and the scattered particles.
    """
    opened = config.open(inputs)
    matched = with_matter([one for one, _ in opened], config, config.matter_of, inputs)
    simulations = [(one, split) for one, (_, split) in zip(matched, opened, strict=True)]
    if any(KINDS[field.name].tracer == "galaxies" for field in config.fields):
        for simulation, _ in simulations:
            if not simulation.group_files:
                raise SimulationError(f"{simulation.name}: there is no group catalogue with galaxies")
    path, scratch, finished = out / "grids.zarr", out / ".ingest", out / ".ingest-finished"
    shutil.rmtree(finished, ignore_errors=True)
    jobs = _jobs(config, [simulation for simulation, _ in simulations], path, scratch)
    try:
        store = open_store(path, mode="r+")
    except StoreError:
        store = None
        shutil.rmtree(scratch, ignore_errors=True)  # marks of another store would be lies
    tasks = [(job, [s for s in range(job.n_slabs) if not job.painted(s).exists()]) for job in jobs]
    durable.require_space(out, _bytes_to_write(config, tasks), f"ingest of {len(simulations)} simulations")
    if store is None:
        store = _create(config, simulations, path)
    if any(slabs for _, slabs in tasks):
        _run(tasks, out)
    store.write_sources({simulation.name: _sources(jobs, simulation) for simulation, _ in simulations})
    if training := store.names("train"):
        store.write_statistics(
            {
                field.name: _merge(
                    [_painted(job, field.name) for job in jobs if job.simulation.name in training]
                )
                for field in config.fields
            }
        )
    os.replace(scratch, finished)  # at once, for marks must not go one by one
    shutil.rmtree(finished)


def _jobs(config: IngestConfig, simulations: list[Simulation], path: Path, scratch: Path) -> list[_Job]:
    tracers: dict[Tracer, tuple[FieldConfig, ...]] = {}
    for field in config.fields:
        tracer = KINDS[field.name].tracer
        if tracer == "particles" and config.matter == "total" and KINDS[field.name].carries != "number":
            tracer = "all_matter"
        tracers[tracer] = (*tracers.get(tracer, ()), field)
    thickness = config.chunking.edge(config.n_mesh)
    jobs = [
        _Job(
            simulation,
            tracer,
            fields,
            config.n_mesh,
            thickness,
            config.min_stellar_mass,
            config.checksums,
            path,
            scratch,
        )
        for simulation in simulations
        for tracer, fields in tracers.items()
    ]
    return [replace(job, lattice=_lattice(job)) if "lattice" in job.tracer else job for job in jobs]


def _lattice(job: _Job) -> Lattice:
    lattice = find_lattice(job.source)
    if lattice.side != job.n_mesh:
        raise SimulationError(
            f"{job.source.name}: field {job.fields[0].name} is of a lattice of {lattice.side}^3 particles, "
            f"n_mesh is {job.n_mesh}: set it to {lattice.side}, in an ingest step of its own if other fields "
            "need another mesh"
        )
    return lattice


def _create(config: IngestConfig, simulations: list[tuple[Simulation, str]], path: Path) -> GridStore:
    fields = [
        Field(
            name=field.name,
            units=KINDS[field.name].units,
            assignment="none" if KINDS[field.name].carries == "displacement" else field.scheme,
            components=KINDS[field.name].components,
        )
        for field in config.fields
    ]
    attrs = [SimulationAttrs.of(simulation, cast(Split, split)) for simulation, split in simulations]
    extra = {"min_stellar_mass": config.min_stellar_mass, "matter": config.matter}
    return create_store(path, attrs, fields, config.n_mesh, config.chunking, extra)


def _bytes_to_write(config: IngestConfig, tasks: list[tuple[_Job, list[int]]]) -> float:
    """An upper bound: the fields uncompressed, and the scattered particles of two simulations at a time."""
    stored, scattered = 0.0, [0.0]
    for job, slabs in tasks:
        components = sum(KINDS[field.name].components for field in job.fields)
        stored += 4.0 * components * len(slabs) * job.thickness * job.n_mesh**2
        if slabs and job.tracer != "galaxies":
            sizes = {"position": 24, "velocity": 12, "mass": 8, "displacement": 12}
            row = sum(sizes[column] for column in job.columns)
            n_particles = sum(map(job.source.n_particles, job.kinds))
            scattered.append(row * n_particles * (1 + 4 / job.thickness))
    return stored + sum(sorted(scattered)[-2:])


def _run(tasks: list[tuple[_Job, list[int]]], out: Path) -> None:
    """Run what is not done, simulation after simulation, and wait for it."""
    from distributed import KilledWorker, as_completed, performance_report

    notes: dict[Any, str] = {}
    with (
        cluster.client(scratch=out / ".ingest" / "dask") as client,
        performance_report(out / "dask-report.html", mode="inline"),
    ):
        for job, slabs in tasks:
            if not slabs:
                continue
            name = f"{job.simulation.name}: {job.tracer}"
            scattered = [client.submit(_scatter, job, index, pure=False) for index in range(len(job.files))]
            painted = [client.submit(_paint, job, slab, scattered, pure=False) for slab in slabs]
            cleaned = client.submit(_clean, job, painted, pure=False)
            notes |= {
                future: f"{name}, file {i + 1} of {len(scattered)}" for i, future in enumerate(scattered)
            }
            notes |= {
                f: f"{name}, slab {s + 1} of {job.n_slabs}" for s, f in zip(slabs, painted, strict=True)
            }
            notes[cleaned] = name
        progress.report(0, len(notes))
        for done, future in enumerate(as_completed(list(notes)), start=1):
            try:
                future.result()
            except KilledWorker as error:
                raise RuntimeError(
                    f"{notes[future]}: {error.allowed_failures + 1} workers died at this task; if they ran "
                    "out of memory, give the step more of it or fewer workers (resources: memory, ranks)"
                ) from error
            progress.report(done, len(notes), notes[future])


def _scatter(job: _Job, index: int) -> None:
    """Group the particles of one file by the slabs that they give to."""
    target = job.scattered(index)
    mark = target.with_suffix(".json")
    if mark.exists() and target.exists():
        return
    reach = max(REACH[field.scheme] for field in job.fields)
    parts: list[dict[str, Any]] = []
    n_read = offset = 0
    # On the disk before its mark: a node that is lost takes with it what was in its memory.
    with durable.atomic_path(target) as temporary, open(temporary, "wb") as stream:
        for columns in _parts(job, index):
            n_read += len(columns["position"])
            part: dict[str, Any] = {"columns": {}}
            if "mass" in columns and len(columns["mass"]) and (columns["mass"] == columns["mass"][0]).all():
                part["mass"] = float(columns.pop("mass")[0])
            order, bounds = _by_slab(columns["position"], job, reach)
            part["bounds"] = bounds
            for name, values in columns.items():
                part["columns"][name] = {
                    "offset": offset,
                    "dtype": values.dtype.str,
                    "width": values[:1].size,
                }
                offset += stream.write(np.take(values, order, axis=0).data)
            parts.append(part)
    durable.write_json(mark, {"n": n_read, "parts": parts, "source": _source(job, index)})


def _parts(job: _Job, index: int) -> Iterator[dict[str, NDArray[Any]]]:
    """Columns of one file, some rows at a time."""
    if job.tracer == "galaxies":
        galaxies = job.simulation.galaxies(job.min_stellar_mass)
        galaxies["mass"] = galaxies["stellar_mass"]
        if len(galaxies["mass"]):
            yield {name: galaxies[name] for name in job.columns}
        return
    file = job.files[index]
    for kind in job.kinds:
        n_rows = job.source.n_particles_in(file, kind)
        for start in range(0, n_rows, _PART):
            stop = min(start + _PART, n_rows)
            if job.lattice is None:
                yield job.source.particles(file, job.columns, start, stop, kind)
                continue
            particles = job.source.particles(file, ("id", "position"), start, stop)
            sites, box_size = job.lattice.sites(particles["id"]), job.source.box_size
            yield {
                "position": (sites + 0.5) * (box_size / job.n_mesh),  # in the cell of that number
                "displacement": job.lattice.displacements(sites, particles["position"], box_size),
            }


def _source(job: _Job, index: int) -> list[dict[str, Any]]:
    files = job.simulation.group_files if job.tracer == "galaxies" else job.files[index : index + 1]
    sources = []
    for file in files:
        is_store = file.is_dir()  # whose attributes say what it was made with
        size = durable.folder_size(file) if is_store else file.stat().st_size
        sha256 = durable.sha256(file) if job.checksums and not is_store else None
        sources.append({"file": str(file), "size": size, "sha256": sha256})
    return sources


def _by_slab(positions: NDArray[Any], job: _Job, reach: float) -> tuple[NDArray[np.int32], list[int]]:
    """Order of particles by slab, and where each slab begins in it. Those at a border are in both slabs."""
    z_blocks, y_blocks = -(-job.thickness // _BLOCK), -(-job.n_mesh // _BLOCK)
    scale = job.n_mesh / job.simulation.box_size
    order, starts = _order(positions, scale, reach, job.n_mesh, job.thickness, z_blocks, y_blocks)
    return order, [int(start) for start in starts[:: z_blocks * y_blocks]]


@numba.njit(nogil=True, cache=True)
def _order(positions, scale, reach, n_mesh, thickness, z_blocks, y_blocks):  # type: ignore[no-untyped-def]
    n_slabs = n_mesh // thickness
    n = positions.shape[0]
    keys = np.empty((n, 2), np.int32)
    starts = np.zeros(n_slabs * z_blocks * y_blocks + 1, np.int64)
    for i in range(n):
        z = positions[i, 2] * scale
        y = min(int(positions[i, 1] * scale) // _BLOCK, y_blocks - 1)
        low = int(np.ceil(z - reach - 0.5)) % n_mesh
        high = int(np.floor(z + reach - 0.5)) % n_mesh
        for side in range(2):
            plane = high if side else low
            slab = plane // thickness
            if side and slab == low // thickness:
                keys[i, 1] = -1
                continue
            key = (slab * z_blocks + (plane - slab * thickness) // _BLOCK) * y_blocks + y
            keys[i, side] = key
            starts[key + 1] += 1
    for key in range(len(starts) - 1):
        starts[key + 1] += starts[key]
    ends = starts[:-1].copy()
    order = np.empty(starts[-1], np.int32)
    for i in range(n):
        for side in range(2):
            key = keys[i, side]
            if key >= 0:
                order[ends[key]] = i
                ends[key] += 1
    return order, starts


def _paint(job: _Job, slab: int, scattered: list[None]) -> None:
    """Assign a slab's particles to the meshes of all fields of the tracer, and write them to the store."""
    mark = job.painted(slab)
    if mark.exists():
        return
    indices = [
        durable.read_json(job.scattered(index).with_suffix(".json")) for index in range(len(job.files))
    ]
    n_read = sum(index["n"] for index in indices)
    expected = sum(map(job.source.n_particles, job.kinds))
    if job.tracer != "galaxies" and n_read != expected:
        raise SimulationError(
            f"{job.simulation.name}: {n_read} particles in {len(job.files)} files, Header/NumPart_Total of "
            f"{job.files[0]} says {expected}: a chunk is missing or of another snapshot"
        )
    grids = open_store(job.store, mode="r+")[job.simulation.name]
    first = slab * job.thickness
    mesh = np.empty((job.thickness, job.n_mesh, job.n_mesh))
    mass = (
        np.empty_like(mesh) if any(KINDS[field.name].carries == "velocity" for field in job.fields) else None
    )

    def fill(mesh: NDArray[np.float64], field: FieldConfig, carries: _Carries, component: int | None) -> None:
        mesh.fill(0)
        for columns in _slab_columns(job, indices, slab, _COLUMNS[carries]):
            weights = None
            if carries == "displacement":
                weights = columns["displacement"][:, component]
            elif component is not None:
                weights = columns["mass"] * columns["velocity"][:, component].astype(np.float64)
            elif carries == "mass":
                weights = columns["mass"]
            box_size = job.simulation.box_size
            assign(columns["position"], box_size, job.n_mesh, field.scheme, weights, mesh, first)

    statistics: dict[str, list[dict[str, float]]] = {}
    for field in job.fields:
        carries = KINDS[field.name].carries
        statistics[field.name] = []
        if mass is not None and carries == "velocity":
            fill(mass, field, "mass", None)
        if carries == "displacement":
            fill(mesh, field, "number", None)
            if empty := np.count_nonzero(mesh == 0):
                raise SimulationError(
                    f"{job.source.name} ({job.files[0].parent}): {empty} sites of the lattice have no "
                    "particle, others have several: IDs are not unique"
                )
        for component in range(3) if KINDS[field.name].components == 3 else (None,):
            fill(mesh, field, carries, component)
            if mass is not None and carries == "velocity":
                np.divide(mesh, mass, out=mesh, where=mass > 0)  # no momentum where there is no mass
            values = _narrow(mesh)
            statistics[field.name].append(_moments(values))
            grids.write(field.name, values, start=first, component=component)
    durable.write_json(mark, statistics)


def _slab_columns(
    job: _Job, indices: list[dict[str, Any]], slab: int, names: tuple[str, ...]
) -> Iterator[dict[str, NDArray[Any]]]:
    """Columns of a slab's particles, part after part of every scattered file; one mass where all have it."""
    for number, index in enumerate(indices):
        if not index["parts"]:
            continue
        with open(job.scattered(number), "rb") as stream:
            for part in index["parts"]:
                start, stop = part["bounds"][slab : slab + 2]
                if start == stop:
                    continue
                columns = {"mass": np.array([part["mass"]])} if "mass" in part else {}
                for name in names:
                    if name in columns:
                        continue
                    column = part["columns"][name]
                    width, dtype = column["width"], np.dtype(column["dtype"])
                    stream.seek(column["offset"] + start * width * dtype.itemsize)
                    values = np.fromfile(stream, dtype, (stop - start) * width)
                    if len(values) < (stop - start) * width:
                        raise SimulationError(
                            f"{stream.name} was cut off: remove {job.scratch} and run the same command again"
                        )
                    columns[name] = values.reshape(-1, 3) if width == 3 else values
                yield columns


def _narrow(mesh: NDArray[np.float64]) -> NDArray[np.float32]:
    """The mesh as float32, in its own memory, whose values are gone after."""
    flat = mesh.reshape(-1)
    narrow = flat.view(np.float32)[: flat.size]
    _copy_forward(flat, narrow)
    return narrow.reshape(mesh.shape)


@numba.njit(nogil=True, cache=True)
def _copy_forward(wide, narrow):  # type: ignore[no-untyped-def]
    for i in range(wide.size):  # value i is written where no later one is read
        narrow[i] = wide[i]


def _moments(values: NDArray[np.float32]) -> dict[str, float]:
    """Number, mean, sum of squared deviations, largest value and number of values that are not zero."""
    moments = {"n": 0.0, "mean": 0.0, "squares": 0.0, "max": -np.inf, "nonzero": 0.0}
    for plane in values:
        wide = plane.astype(np.float64)
        mean = float(wide.mean())
        moments = _combine(
            moments,
            {
                "n": float(wide.size),
                "mean": mean,
                "squares": float(np.sum((wide - mean) ** 2)),
                "max": float(wide.max()),
                "nonzero": float(np.count_nonzero(wide)),
            },
        )
    return moments


def _combine(a: dict[str, float], b: dict[str, float]) -> dict[str, float]:
    """Moments of both (Chan, Golub & LeVeque 1979)."""
    n = a["n"] + b["n"]
    difference = b["mean"] - a["mean"]
    return {
        "n": n,
        "mean": a["mean"] + difference * b["n"] / n,
        "squares": a["squares"] + b["squares"] + difference**2 * a["n"] * b["n"] / n,
        "max": max(a["max"], b["max"]),
        "nonzero": a["nonzero"] + b["nonzero"],
    }


def _painted(job: _Job, field: str) -> list[dict[str, float]]:
    """Moments of the field in every slab; empty where the tracer does not make it."""
    if field not in {each.name for each in job.fields}:
        return []
    return [part for slab in range(job.n_slabs) for part in durable.read_json(job.painted(slab))[field]]


def _merge(parts: list[list[dict[str, float]]]) -> FieldStatistics:
    moments = {"n": 0.0, "mean": 0.0, "squares": 0.0, "max": -np.inf, "nonzero": 0.0}
    for part in (part for simulation in parts for part in simulation):
        moments = _combine(moments, part)
    return FieldStatistics(
        mean=moments["mean"],
        std=float(np.sqrt(moments["squares"] / moments["n"])),
        max=moments["max"],
        nonzero_fraction=moments["nonzero"] / moments["n"],
    )


def _clean(job: _Job, painted: list[None]) -> None:
    """Remove the scattered particles of a simulation that is in the store."""
    for index in range(len(job.files)):
        job.scattered(index).unlink(missing_ok=True)


def _sources(jobs: list[_Job], simulation: Simulation) -> list[Source]:
    marks = [
        durable.read_json(job.scattered(index).with_suffix(".json"))
        for job in jobs
        if job.simulation.name == simulation.name
        for index in range(len(job.files))
    ]
    return [Source.model_validate(source) for mark in marks for source in mark["source"]]
