"""Central galaxies and their halos from the tables of group catalogues: structure and environment.

What a group catalogue has no profiles or histories for follows from what it has: the concentration from the
largest circular velocity, the spin parameter from the angular momentum.
"""

from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field as Constraint

from galdist.catalogs.catalog import CatalogStore
from galdist.catalogs.columns import QUANTITIES, Columns, Rows
from galdist.catalogs.environment import OverdensityConfig, overdensity
from galdist.config import ExternalPath, StrictModel
from galdist.constants import GRAVITY
from galdist.simulations.simulation import SimulationError
from galdist.simulations.trees import find_trees, half_mass_redshift

_PEAK = 2.1625816  # r_max in scale radii of an NFW profile
_HIGHEST = 1e3


class HaloOverdensityConfig(OverdensityConfig):
    """How to compute ``overdensity`` around halos of a group catalogue."""

    of: Literal["halos", "galaxies"] = "halos"
    """Whose density. Galaxies are what is to be predicted: a run without them does not have theirs."""
    weight: Literal["mass", "stellar_mass"] | None = "mass"
    """Column of ``of`` whose sum is the density: ``mass`` of halos (all linked particles), ``stellar_mass``
    of galaxies; null: the density is one of numbers."""


class TreesConfig(StrictModel):
    """SubLink's merger trees, for the column ``formation_redshift``."""

    path: ExternalPath
    """Folder of tree_extended.<n>.hdf5; of several simulations, folders by their names that hold these."""
    snapshot: Annotated[int, Constraint(ge=0)]
    """Number of the snapshot of the group catalogue."""
    redshifts: ExternalPath
    """Text file with the redshifts of snapshots 0, 1, ..., one a line."""


class HalosConfig(StrictModel):
    """What to take from the tables of a step ``catalog``."""

    mass: Literal["200c", "vir"] = "200c"
    """Definition of the halo's mass, and of the radius that concentration and spin refer to: 200 times the
    critical density, which Rodrigues et al. (2023) and de Santi et al. (2022) call virial, or the virial
    density of Bryan & Norman (1998)."""
    overdensity: HaloOverdensityConfig = HaloOverdensityConfig()
    trees: TreesConfig | None = None
    """Merger trees; without them there is no ``formation_redshift``."""


def nfw_concentration(v_max: ArrayLike, v_virial: ArrayLike) -> NDArray[np.float64]:
    """Concentration of the NFW profile whose circular velocity has this maximum (Prada et al. 2012,
    MNRAS 423, 3018, eq. 8 and 9; Klypin, Trujillo-Gomez & Primack 2011).

    (v_max / v_virial)^2 = f(x) / x * c / f(c) with f(x) = ln(1 + x) - x / (1 + x) and x = 2.163. No NFW
    profile has v_max < v_virial: the answer is then the concentration 2.163, where they are equal.

    Parameters
    ----------
    v_max
        largest circular velocity, of any shape.
    v_virial
        circular velocity at the virial radius, in the same units.

    Returns
    -------
    array
        2.163 to 1000.
    """
    grid = np.geomspace(_PEAK, _HIGHEST, 20_000)
    ratio = np.sqrt(_mass(_PEAK) / _PEAK * grid / _mass(grid))
    measured = np.asarray(v_max, np.float64) / np.asarray(v_virial, np.float64)
    return np.exp(np.interp(measured, ratio, np.log(grid)))


def _mass(x: Any) -> Any:
    """Of an NFW profile within x scale radii, in its own units."""
    return np.log1p(x) - x / (1 + x)


def bullock_spin(angular_momentum: ArrayLike, mass: ArrayLike, radius: ArrayLike) -> NDArray[np.float64]:
    """Spin parameter lambda' = j / (sqrt(2) V R) of Bullock et al. (2001, ApJ 555, 240, eq. 5).

    Parameters
    ----------
    angular_momentum
        (n, 3) specific [Mpc/h km/s].
    mass, radius
        (n,) of the halo [Msun/h], [physical Mpc/h]; V is its circular velocity there.
    """
    mass, radius = np.asarray(mass, np.float64), np.asarray(radius, np.float64)
    j = np.linalg.norm(np.asarray(angular_momentum, np.float64), axis=1)
    return np.asarray(j / np.sqrt(2 * GRAVITY * mass * radius))


def read_catalog(store: CatalogStore, simulation: str, config: HalosConfig) -> Rows:
    """Halos with a central galaxy in the table ``galaxies``: the columns of `QUANTITIES`.

    Concentration and spin are there where the group catalogue has what they need, and refer to all matter of
    the central subhalo. Halos that are nowhere as dense as the definition of mass asks for are left out, and
    so are those that are not in the merger trees, where there are any.

    Raises
    ------
    SimulationError
        where the simulation has no galaxies, or its halos no mass of this definition.
    """
    where = f"{store.path}: {simulation}"
    if missing := {"halos", "galaxies"} - set(store.tables(simulation)):
        raise SimulationError(f"{where}: there is no table of {' and '.join(sorted(missing))}")
    attrs = store.attrs(simulation)
    halos, galaxies = store.table(simulation, "halos"), store.table(simulation, "galaxies")
    if f"mass_{config.mass}" not in halos:
        raise SimulationError(f"{where}: its group catalogue has no mass_{config.mass}; choose `mass: 200c`")
    central = np.flatnonzero(galaxies["is_central"] & (galaxies["halo"] >= 0))
    mass = halos[f"mass_{config.mass}"][galaxies["halo"][central]]
    dense = mass > 0
    central, mass = central[dense], mass[dense]
    galaxy = {name: values[central] for name, values in galaxies.items()}
    halo = {name: values[galaxy["halo"]] for name, values in halos.items()}
    physical_radius = halo[f"radius_{config.mass}"] / (1 + attrs.redshift)

    columns: Columns = {"position": halo["position"], "halo": galaxy["halo"], "log_halo_mass": np.log10(mass)}
    facts: dict[str, Any] = {"halos_without_mass": int((~dense).sum()), "mass": config.mass}
    if "v_max" in galaxy:
        v_virial = np.sqrt(GRAVITY * mass / physical_radius)
        columns["log_concentration"] = np.log10(nfw_concentration(galaxy["v_max"], v_virial))
        facts["v_max_below_virial"] = int((galaxy["v_max"] < v_virial).sum())
    if "angular_momentum" in galaxy:
        columns["spin"] = bullock_spin(galaxy["angular_momentum"], mass, physical_radius)
    if config.trees is not None:
        columns["formation_redshift"] = _formation(config.trees, simulation, galaxy["subhalo"])
        facts["halos_without_history"] = int(np.isnan(columns["formation_redshift"]).sum())
    columns["overdensity"] = _overdensity(config.overdensity, halos, galaxies, columns, attrs.box_size, where)
    with np.errstate(divide="ignore"):  # no star formation: -inf
        columns |= {
            "log_stellar_mass": np.log10(galaxy["stellar_mass"]),
            "color_gi": galaxy["color_gi"],
            "log_ssfr": np.log10(galaxy["star_formation_rate"] / galaxy["stellar_mass"]),
            "log_radius": np.log10(galaxy["half_mass_radius"] * 1e3),
        }
    if config.trees is not None:
        known = np.isfinite(columns["formation_redshift"])
        columns = {name: values[known] for name, values in columns.items()}
        central = central[known]
    units = {name: quantity.units for name, quantity in QUANTITIES.items()} | {"position": "Mpc/h"}
    facts |= {
        "source": str(store.path),
        "overdensity": config.overdensity.model_dump(),
    }
    return Rows(attrs, columns, units, facts, central)


def _formation(config: TreesConfig, simulation: str, subhalos: NDArray[np.int64]) -> NDArray[np.float64]:
    try:
        redshifts = np.loadtxt(config.redshifts, ndmin=1)
    except (OSError, ValueError) as error:
        raise SimulationError(f"{config.redshifts}: expected a redshift a line: {error}") from error
    if redshifts.ndim != 1 or np.any(np.diff(redshifts) >= 0):
        raise SimulationError(f"{config.redshifts}: expected a redshift a line, lower with each snapshot")
    own = config.path / simulation
    files = find_trees(own if own.is_dir() else config.path)
    return half_mass_redshift(files, subhalos, config.snapshot, redshifts)


def _overdensity(
    config: HaloOverdensityConfig,
    halos: Columns,
    galaxies: Columns,
    columns: Columns,
    box_size: float,
    where: str,
) -> NDArray[np.float64]:
    table = halos if config.of == "halos" else galaxies
    if config.weight is not None and config.weight not in table:
        raise SimulationError(f"{where}: overdensity: {config.of} have no {config.weight} to weigh by")
    weight = None if config.weight is None else table[config.weight]
    return overdensity(table["position"], box_size, config.radius, weight, columns["position"])
