"""The matter of simulations where it is another run's: N-body and COLA from the same initial conditions.

Runs belong together by name (``CV_0``), whatever their suites. What files say of them must agree: a box, a
redshift, a cosmology and, where both are known, the seed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from galdist.config import ExternalPath, StrictModel
from galdist.simulations.simulation import SelectionConfig, Simulation, SimulationError, nearest, read_header


class MatterConfig(StrictModel):
    """Where the matter is, in files of the same format."""

    path: ExternalPath | None = None
    """By default where the simulations are."""
    suite: str | None = None
    """May be left out where there is one."""
    volume: str | None = None
    """May be left out where there is one. CAMELS only."""


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
        under ``matter``, the step that has them. By neither the matter is the simulations' own.

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
        others = SelectionConfig(
            format=selection.format,
            path=ExternalPath(steps[0] if steps else matter_of.path or places[0]),
            suite=matter_of.suite,
            set=simulations[0].set or None,
            volume=matter_of.volume,
            snapshot=selection.snapshot,
            redshift=selection.redshift,
            matter=selection.matter,
        ).open({})
        twins = {_namesake(other): other for other, _ in others}
        for simulation in simulations:
            if (name := _namesake(simulation)) not in twins:
                raise nearest(f"simulation to take the matter of {simulation.name} from:", name, list(twins))
        simulations = [replace(one, matter_twin=twins[_namesake(one)]) for one in simulations]
    for simulation in simulations:
        _check(simulation)
    return list(simulations)


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
