"""The matter of simulations where it is another run's: N-body and COLA from the same initial conditions, or
COLA as a network corrected it.

Runs belong together by name (``CV_0``), whatever their suites. What files say of them must agree: a box, a
redshift, a cosmology and, where both are known, the seed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from galdist.config import ExternalPath, StrictModel
from galdist.constants import CRITICAL_DENSITY
from galdist.grids.store import SimulationGrids, open_store
from galdist.simulations.simulation import (
    DARK_MATTER,
    Columns,
    SelectionConfig,
    Simulation,
    SimulationError,
    nearest,
    read_header,
)

PREDICTION = "prediction.zarr"
DISPLACEMENT = "displacement"


class MatterConfig(StrictModel):
    """Where the matter is, in files of the same format."""

    path: ExternalPath | None = None
    """By default where the simulations are."""
    suite: str | None = None
    """May be left out where there is one."""
    volume: str | None = None
    """May be left out where there is one. CAMELS only."""


@dataclass(frozen=True)
class DisplacedLattice(Simulation):
    """A simulation whose particles are where the displacements of a grid store have them.

    They have positions and equal masses, and no velocities.
    """

    @cached_property
    def _grids(self) -> SimulationGrids:
        return open_store(self.particle_files[0])[self.name]

    @property
    def box_size(self) -> float:
        return self._grids.attrs.box_size

    @property
    def redshift(self) -> float:
        return self._grids.attrs.redshift

    @property
    def cosmology(self) -> dict[str, float]:
        return self._grids.attrs.cosmology

    def n_particles(self, kind: int = DARK_MATTER) -> int:
        return self._grids.n_mesh**3 if kind == DARK_MATTER else 0

    def n_particles_in(self, file: Path, kind: int = DARK_MATTER) -> int:
        del file  # there is one
        return self.n_particles(kind)

    def particles(
        self,
        file: Path,
        columns: Sequence[str] = ("position", "mass"),
        start: int = 0,
        stop: int | None = None,
        kind: int = DARK_MATTER,
    ) -> Columns:
        grids, n_total = self._grids, self.n_particles(kind)
        side, box_size = grids.n_mesh, grids.attrs.box_size
        rows = np.arange(start, n_total if stop is None else min(stop, n_total))  # of sites (z, y, x)
        sites = np.stack([rows % side, rows // side % side, rows // side**2], axis=1)
        out: Columns = {}
        for column in columns:
            if column == "position":
                planes = slice(start // side**2, sites[-1, 2] + 1 if len(rows) else 0)
                moved = grids.read(DISPLACEMENT, (slice(None), planes)).reshape(3, -1)
                moved = moved[:, start - planes.start * side**2 :][:, : len(rows)].T
                position = (sites * (box_size / side) + moved) % box_size
                out[column] = np.where(position < box_size, position, 0.0)
            elif column == "mass":
                total = grids.attrs.cosmology["Omega_m"] * CRITICAL_DENSITY * box_size**3
                out[column] = np.full(len(rows), total / n_total)
            elif column == "id":
                out[column] = ((sites[:, 0] * side + sites[:, 1]) * side + sites[:, 2]).astype("u8")
            else:
                raise SimulationError(f"{file}: particles of a predicted displacement have no {column}")
        return out


def with_matter(
    simulations: Sequence[Simulation],
    selection: SelectionConfig,
    matter_of: MatterConfig | None,
    inputs: Mapping[str, Sequence[Path]],
) -> list[Simulation]:
    """The simulations, each with the run that its matter is taken from, if that is another.

    Parameters
    ----------
    selection
        what ``simulations`` were chosen by; set, snapshot and kind of matter are those of the other runs too.
    matter_of
        where the other runs are, or
    inputs
        under ``matter``, the step that has them: simulations, or displacements that were predicted. By
        neither the matter is the simulations' own.

    Raises
    ------
    SimulationError
        where both say it; where a simulation has no namesake; where two of a name are not of one universe
        (the message says what differs), or galaxies not of the universe of their matter.
    """
    steps = list(inputs.get("matter", ()))
    if steps and matter_of is not None:
        raise SimulationError(
            "matter: give either `matter_of` in the config or a step under `inputs: matter`"
        )
    if steps or matter_of is not None:
        places = [*inputs.get("simulations", ()), *([selection.path] if selection.path else [])]
        matter_of = matter_of or MatterConfig()
        path = ExternalPath(steps[0] if steps else matter_of.path or places[0])
        if (path / PREDICTION).is_dir():
            others = _displaced(path / PREDICTION)
        else:
            opened = SelectionConfig(
                format=selection.format,
                path=path,
                suite=matter_of.suite,
                set=simulations[0].set or None,
                volume=matter_of.volume,
                snapshot=selection.snapshot,
                redshift=selection.redshift,
                matter=selection.matter,
            ).open({})
            others = [other for other, _ in opened]
        twins = {_namesake(other): other for other in others}
        for simulation in simulations:
            if (name := _namesake(simulation)) not in twins:
                raise nearest(f"simulation to take the matter of {simulation.name} from:", name, list(twins))
        simulations = [replace(one, matter_twin=twins[_namesake(one)]) for one in simulations]
    for simulation in simulations:
        _check(simulation)
    return list(simulations)


def _displaced(path: Path) -> list[Simulation]:
    store = open_store(path)
    found: list[Simulation] = []
    for name in store:
        store[name].array(DISPLACEMENT)
        attrs = store[name].attrs
        found.append(DisplacedLattice(name, attrs.suite, attrs.set, (path,), (), seed=attrs.seed))
    return found


def _namesake(simulation: Simulation) -> str:
    return simulation.name.removeprefix(f"{simulation.suite}_")


def _check(simulation: Simulation) -> None:
    """Matter and galaxies are of one universe."""
    matter = simulation.matter
    what = {"box size [Mpc/h]": (simulation.box_size, matter.box_size, 1e-6 * matter.box_size)}
    what["redshift"] = (simulation.redshift, matter.redshift, 1e-3 * (1 + matter.redshift))
    for name, value in simulation.cosmology.items():
        if name in matter.cosmology:
            what[name] = (value, matter.cosmology[name], 1e-3)
    if simulation.seed is not None and matter.seed is not None:
        what["seed"] = (simulation.seed, matter.seed, 0)
    where = f"{simulation.name}, and its matter in {matter.particle_files[0].parent}"
    if matter is simulation and simulation.group_files:
        header = read_header(simulation.group_files[0])
        where = f"{simulation.name}: galaxies ({simulation.group_files[0]}) and matter"
        what = {
            "box size [Mpc/h]": (header.box_size, matter.box_size, 1e-6 * matter.box_size),
            "redshift": (header.redshift, matter.redshift, 1e-3 * (1 + matter.redshift)),
        }
    wrong = [
        f"{name} {one:g} and {other:g}" for name, (one, other, off) in what.items() if abs(one - other) > off
    ]
    if wrong:
        raise SimulationError(f"{where} are not of one universe: {'; '.join(wrong)}")
