"""The `simulate` stage: sets of small universes in the files of the public simulations.

Each simulation is run by COLA (`cola`), its halos are found (`halos`), galaxies put into them (`formation`),
and all is written in the layout of CAMELS or IllustrisTNG (`files`).
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from galdist.config import StrictModel
from galdist.simulations import cola, files, formation, halos
from galdist.simulations.cola import Cosmology
from galdist.simulations.formation import FEEDBACK
from galdist.simulations.snapshots import Layout, snapshot_at
from galdist.statistics import require_nbodykit
from hpc import durable, mpi, progress

log = logging.getLogger(__name__)
# of CAMELS' Latin hypercube (Villaescusa-Navarro et al. 2021, table 1); feedback uniform in the logarithm
RANGES = {
    "Omega_m": (0.1, 0.5),
    "sigma_8": (0.6, 1.0),
    "A_SN1": (0.25, 4.0),
    "A_AGN1": (0.25, 4.0),
    "A_SN2": (0.5, 2.0),
    "A_AGN2": (0.5, 2.0),
}
_PROGENITOR_TIMES = (0.3, 0.45, 0.6, 0.75, 0.9)  # scale factors at which progenitors are looked for


class SimulateConfig(StrictModel):
    """What universes to make."""

    suite: formation.Suite = "MockA"
    """Variant of the mock galaxy formation model; the name of the suite."""
    set: Literal["CV", "LH"] = "CV"
    """CV: fiducial parameters. LH: a Latin hypercube of cosmology and feedback. Seeds differ in both."""
    simulations: Annotated[int, Field(ge=1, le=10_000)] = 3
    """Number of simulations of the set."""
    select: tuple[int, ...] | None = None
    """Make only these simulations of the set (0 to simulations - 1)."""
    seed: Annotated[int, Field(ge=0, lt=200_000)] = 0
    """Simulation i has the seed 10000 * seed + i + 1 (0 and 1 would give pmesh the same noise)."""
    layout: Layout = "camels"
    """Tree and names of the files."""
    redshifts: Annotated[tuple[float, ...], Field(min_length=1)] = (0.0,)
    """What is written, all of one run: redshifts of CAMELS' snapshots (two digits), or of TNG's full ones."""
    n_files: Annotated[int, Field(ge=1)] = 1
    """Chunks of a snapshot; ranks write them side by side, so no fewer than ranks in large runs."""
    box_size: Annotated[float, Field(gt=2 * halos.ENVIRONMENT_RADIUS)] = 25.0
    """Mpc/h; more than the diameter of what is called a halo's environment."""
    n_particles: Annotated[int, Field(ge=8)] = 64
    """Particles a side."""
    steps: Annotated[int, Field(ge=2)] = 15
    """COLA time steps, equal in the scale factor."""
    mesh_factor: Annotated[int, Field(ge=1, le=8)] = 3
    """Force mesh cells a side for each particle a side; 2 is three times faster, its halos softer."""
    initial_redshift: Annotated[float, Field(gt=1)] = 19.0
    """Where 2LPT hands over to COLA."""
    precision: Literal["f4", "f8"] = "f8"
    """f4 takes half the memory; numbers of ranks then agree to 1e-4 of the box, with f8 to 1e-12."""
    fixed_amplitude: bool = False
    """Initial modes of exactly their mean amplitude, with random phases."""
    inverted_phase: bool = False
    """Initial field of the opposite sign: the pair of the simulation with the same seed."""
    transfer: cola.Transfer = "CLASS"
    """Linear transfer function."""
    Omega_m: Annotated[float, Field(gt=0, lt=1)] = 0.3
    """Of the CV set."""
    sigma_8: Annotated[float, Field(gt=0, lt=2)] = 0.8
    """Of the CV set."""
    Omega_b: Annotated[float, Field(gt=0, lt=1)] = 0.049
    h: Annotated[float, Field(gt=0.3, lt=1.5)] = 0.6711
    n_s: Annotated[float, Field(gt=0.5, lt=1.5)] = 0.9624

    @model_validator(mode="after")
    def _check(self) -> "SimulateConfig":
        times = [snapshot_at(self.layout, redshift)[1] for redshift in self.redshifts]
        if len(set(times)) < len(times):
            raise ValueError(f"redshifts: two of {self.redshifts} are of one snapshot")
        if 1 / min(times) - 1 >= self.initial_redshift:
            raise ValueError(
                f"redshifts: {max(self.redshifts):g} is before the start; initial_redshift is "
                f"{self.initial_redshift:g}"
            )
        wrong = [i for i in self.select or () if not 0 <= i < self.simulations]
        if wrong:
            raise ValueError(
                f"select: {wrong} not among the {self.simulations} simulations of this set, which are 0 to "
                f"{self.simulations - 1}"
            )
        lowest = RANGES["Omega_m"][0] if self.set == "LH" else self.Omega_m
        if self.Omega_b >= lowest:
            raise ValueError(
                f"Omega_b ({self.Omega_b}) must be below Omega_m ({lowest} at least in this set)"
            )
        return self

    @property
    def volume(self) -> str:
        """Name of the box, like ``L25n64``."""
        side = np.format_float_positional(self.box_size, trim="-")  # no exponent and every digit
        return f"L{side}n{self.n_particles}"


@dataclass(frozen=True)
class Universe:
    """The parameters of one simulation of a set."""

    index: int
    cosmology: Cosmology
    feedback: dict[str, float]
    seed: int

    @property
    def parameters(self) -> dict[str, float]:
        """The six that CAMELS varies."""
        return {"Omega_m": self.cosmology.Omega_m, "sigma_8": self.cosmology.sigma_8, **self.feedback}


def universes(config: SimulateConfig) -> list[Universe]:
    """The simulations of the set that are selected."""
    from scipy.stats import qmc

    fiducial = {"Omega_m": config.Omega_m, "sigma_8": config.sigma_8, **dict.fromkeys(FEEDBACK, 1.0)}
    rows = [fiducial] * config.simulations
    if config.set == "LH":
        points = qmc.LatinHypercube(len(RANGES), rng=config.seed).random(config.simulations)
        rows = [
            {
                name: float(low * (high / low) ** u if name in FEEDBACK else low + (high - low) * u)
                for u, (name, (low, high)) in zip(point, RANGES.items(), strict=True)
            }
            for point in points
        ]
    chosen = range(config.simulations) if config.select is None else sorted(set(config.select))
    return [
        Universe(
            index=i,
            cosmology=Cosmology(
                Omega_m=rows[i]["Omega_m"],
                sigma_8=rows[i]["sigma_8"],
                Omega_b=config.Omega_b,
                h=config.h,
                n_s=config.n_s,
            ),
            feedback={name: rows[i][name] for name in FEEDBACK},
            seed=10_000 * config.seed + i + 1,
        )
        for i in chosen
    ]


def simulate(config: SimulateConfig, inputs: Mapping[str, list[Path]], out: Path) -> None:
    """Make the simulations of a set under ``out``, on all MPI ranks. Those that are complete are kept."""
    require_nbodykit()
    comm = mpi.world()
    chosen = universes(config)
    places = [
        [
            files.SimulationFiles(
                out=out,
                layout=config.layout,
                suite=config.suite,
                volume=config.volume,
                set=config.set,
                index=universe.index,
                n_files=config.n_files,
                redshift=redshift,
            )
            for redshift in sorted(config.redshifts, reverse=True)
        ]
        for universe in chosen
    ]
    complete = comm.bcast([all(paths.last.exists() for paths in outputs) for outputs in places])
    particle = (24 if config.layout == "tng" else 12) + 12 + 8  # position, velocity, ID
    missing = complete.count(False)
    durable.require_space(
        out,
        missing * len(config.redshifts) * particle * config.n_particles**3,
        f"particles of {missing} simulations",
    )
    for done, (universe, outputs, there) in enumerate(zip(chosen, places, complete, strict=True)):
        if not there:
            _make(comm, config, universe, outputs, done, len(chosen))
    if comm.rank == 0:
        files.write_parameters(
            files.parameters_path(out, config.suite, config.volume, config.set),
            [(f"{config.set}_{u.index}", u.parameters, u.seed) for u in chosen],
        )
        progress.report(len(chosen), len(chosen), "complete")
    comm.Barrier()


def _make(
    comm: Any,
    config: SimulateConfig,
    universe: Universe,
    outputs: Sequence[files.SimulationFiles],
    done: int,
    total: int,
) -> None:
    """One simulation, from initial conditions to the files of each output, the earliest first."""

    def report(part: float, note: str) -> None:
        if comm.rank == 0:
            progress.report(done + part, total, f"{config.suite} {outputs[0].name}: {note}")

    waiting = {paths.scale_factor: paths for paths in outputs}
    pending = list(_PROGENITOR_TIMES)
    progenitors: list[tuple[float, np.ndarray]] = []
    steps = cola.evolve(
        comm,
        universe.cosmology,
        box_size=config.box_size,
        n_particles=config.n_particles,
        seed=universe.seed,
        steps=config.steps,
        mesh_factor=config.mesh_factor,
        initial_redshift=config.initial_redshift,
        dtype=config.precision,
        transfer=config.transfer,
        fixed_amplitude=config.fixed_amplitude,
        inverted_phase=config.inverted_phase,
        outputs=list(waiting),
    )
    report(0.0, "initial conditions")
    step = -1
    for particles in steps:
        a = particles.scale_factor
        step += not particles.between
        share = 0.8 * (step + 1) / (config.steps + 1) + 0.2 * (1 - len(waiting) / len(outputs))
        report(share, f"step {step} of {config.steps}, z={1 / a - 1:.2f}")
        if a in waiting:
            paths = waiting.pop(a)
            _write(comm, config, universe, paths, particles, progenitors, partial(report, share))
            if not waiting:
                break
        # Not at outputs, so that what is written of one redshift does not depend on which others are.
        if step < config.steps and pending and a >= pending[0] and not particles.between:
            pending = [time for time in pending if time > a]
            groups = cola.friends_of_friends(
                comm, particles.position, config.box_size, halos.LINKING_LENGTH, halos.MINIMUM_PARTICLES
            )
            progenitors.append((a, groups))


def _write(
    comm: Any,
    config: SimulateConfig,
    universe: Universe,
    paths: files.SimulationFiles,
    particles: cola.Particles,
    progenitors: Sequence[tuple[float, np.ndarray]],
    report: Callable[[str], None],
) -> None:
    """Halos, galaxies and files of one time; ``progenitors`` are groups at earlier ones."""
    cosmology, n_total, a = universe.cosmology, config.n_particles**3, particles.scale_factor
    header = files.Header(
        cosmology, config.box_size, n_total, cosmology.mean_density * config.box_size**3 / n_total, a
    )
    report("halos")
    number, own, members = halos.find_halos(comm, cosmology, particles, progenitors, config.box_size)
    report("galaxies")
    everything = halos.Halos.concatenate(comm.allgather(own))
    everything = everything.take(np.argsort(everything.number))
    trends = formation.Trends.measure(
        everything.mass, everything.concentration, everything.formation_redshift
    )
    galaxies = formation.populate(
        own,
        members,
        trends,
        physics=formation.PHYSICS[config.suite],
        feedback=universe.feedback,
        h=cosmology.h,
        seed=universe.seed,
        redshift=1.0 / a - 1.0,
        age=cosmology.age(a),
    )
    galaxies = comm.gather(galaxies)

    report("files")
    starts = np.cumsum(everything.length) - everything.length
    index = [starts[n] + np.arange(length) for n, length in zip(own.number, own.length, strict=True)]
    free = number < 0
    files.write_snapshot(
        comm,
        paths,
        header,
        np.concatenate(
            [*index, _places_outside(comm, particles.ids, free, config.n_particles) + everything.length.sum()]
        ),
        np.concatenate((members.ids, particles.ids[free])),
        np.concatenate((members.position, particles.position[free])),
        np.concatenate((members.velocity, particles.velocity[free])),
    )
    if comm.rank == 0:
        galaxies = formation.Galaxies.concatenate(galaxies)
        galaxies = galaxies.take(np.argsort(galaxies.halo, kind="stable"))
        if config.layout == "camels":
            files.write_groups(paths, header, everything, None, starts)
        files.write_groups(paths, header, everything, galaxies, starts)
        log.info(
            "%s %s, z=%.2f: %d halos, %d galaxies above 1e9 Msun/h",
            config.suite,
            paths.name,
            1 / a - 1,
            len(everything),
            (galaxies.stellar_mass > 1e9).sum(),
        )
    comm.Barrier()


def _places_outside(comm: Any, ids: np.ndarray, free: np.ndarray, n_particles: int) -> np.ndarray:
    """Place of each particle outside groups among all of them, by ID.

    A row of the lattice is whole on one rank (pmesh divides the first two axes), so counts of rows suffice.
    """
    rows = ids[free] // n_particles
    counts = np.bincount(rows, minlength=n_particles**2)
    before = np.cumsum(comm.allreduce(counts)) - comm.allreduce(counts)
    inside = np.arange(len(rows)) - np.searchsorted(rows, rows)
    return before[rows] + inside
