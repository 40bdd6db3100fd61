"""A mock galaxy formation model: galaxies of known dependence on halo mass, history, environment and
feedback.

It stands for a hydrodynamic simulation where none is at hand. Stellar masses follow a double power law of
halo mass (Moster, Naab & White 2013, arXiv:1205.5807, eq. 2; eqs. 11-14 for other redshifts), shifted by the
halo's environment, formation time and concentration: two halos of one mass do not hold the same galaxies, so
a halo model of mass alone cannot be right. Satellites follow the unevolved subhalo mass function of Giocoli,
Tormen & van den Bosch (2008, arXiv:0712.1563). The four feedback parameters act in the sense of CAMELS
(Villaescusa-Navarro et al. 2021, arXiv:2010.00619). Every random number is a hash of (seed, halo, draw):
galaxies do not depend on the number of ranks or the order of halos.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import special

from galdist.simulations.halos import MINIMUM_PARTICLES, Halos, Members, Table

Suite = Literal["MockA", "MockB"]
FEEDBACK = ("A_SN1", "A_AGN1", "A_SN2", "A_AGN2")
PHOTOMETRIC_BANDS = ("U", "B", "V", "K", "g", "r", "i", "z")
_PRESENT_AGE = 13.8  # of the universe [Gyr]
_SATELLITE_DRAWS = 100  # draws of satellite k start at (k + 1) * this


@dataclass(frozen=True)
class Physics:
    """The numbers of one variant. Masses are Msun, slopes and shifts dex.

    Attributes
    ----------
    efficiency, pivot_mass, low_slope, high_slope
        N, M1, beta and gamma of Moster et al. (2013), eq. 2, at z=0.
    environment, formation, concentration
        shift of log10 stellar mass for one standard deviation of overdensity, formation time and
        concentration at fixed mass.
    scatter
        standard deviation of log10 stellar mass at fixed halo properties.
    satellite_survival
        fraction of all subhalos ever accreted that still hold a galaxy; the others have merged or are
        disrupted.
    satellite_environment
        shift of log10 of the mean number of satellites with one standard deviation of overdensity.
    supernova_mass, supernova_strength
        halos below this mass lose stars as A_SN1^-strength.
    agn_mass, agn_strength
        halos above this mass lose stars as A_AGN1^-strength.
    quenching_mass, quenching_width
        stellar mass [Msun] at which half of the centrals are quiescent; width [dex].
    """

    efficiency: float
    pivot_mass: float
    low_slope: float
    high_slope: float
    environment: float
    formation: float
    concentration: float
    scatter: float
    satellite_survival: float
    satellite_environment: float
    supernova_mass: float
    supernova_strength: float
    agn_mass: float
    agn_strength: float
    quenching_mass: float
    quenching_width: float


PHYSICS: dict[str, Physics] = {
    "MockA": Physics(
        efficiency=0.0351,
        pivot_mass=10**11.59,
        low_slope=1.376,
        high_slope=0.608,
        environment=0.30,
        formation=0.10,
        concentration=0.06,
        scatter=0.10,
        satellite_survival=0.40,
        satellite_environment=0.20,
        supernova_mass=4e11,
        supernova_strength=0.5,
        agn_mass=3e12,
        agn_strength=0.3,
        quenching_mass=10**10.5,
        quenching_width=0.35,
    ),
    "MockB": Physics(
        efficiency=0.028,
        pivot_mass=10**11.75,
        low_slope=1.15,
        high_slope=0.70,
        environment=0.20,
        formation=0.16,
        concentration=0.02,
        scatter=0.15,
        satellite_survival=0.50,
        satellite_environment=0.10,
        supernova_mass=8e11,
        supernova_strength=0.35,
        agn_mass=1.5e12,
        agn_strength=0.4,
        quenching_mass=10**10.3,
        quenching_width=0.5,
    ),
}


@dataclass
class Galaxies(Table):
    """Columns of n galaxies at one time, by halo: the central first, then its satellites from the most
    massive down.

    Attributes
    ----------
    halo
        number of the halo.
    is_central
        bool.
    position, velocity
        (n, 3): Mpc/h; peculiar km/s.
    stellar_mass
        Msun/h.
    star_formation_rate
        Msun/yr.
    color_gi
        g-i.
    half_mass_radius
        of the stars, Mpc/h.
    magnitudes
        (n, 8) absolute, in U, B, V, K, g, r, i, z.
    v_max, velocity_dispersion
        of the (sub)halo, km/s.
    """

    halo: np.ndarray
    is_central: np.ndarray
    position: np.ndarray
    velocity: np.ndarray
    stellar_mass: np.ndarray
    star_formation_rate: np.ndarray
    color_gi: np.ndarray
    half_mass_radius: np.ndarray
    magnitudes: np.ndarray
    v_max: np.ndarray
    velocity_dispersion: np.ndarray


@dataclass(frozen=True)
class Trend:
    """Mean of log10 of a halo property as a line in log10 mass, and the standard deviation around it."""

    intercept: float
    slope: float
    deviation: float

    @classmethod
    def measure(cls, mass: np.ndarray, value: np.ndarray) -> "Trend":
        """From all halos of a simulation, in the order of their numbers."""
        x, y = np.log10(mass), np.log10(value)
        if not len(x):
            return cls(0.0, 0.0, 0.0)
        spread = x.var()
        slope = ((x - x.mean()) * (y - y.mean())).mean() / spread if spread > 0.0 else 0.0
        intercept = y.mean() - slope * x.mean()
        return cls(float(intercept), float(slope), float((y - slope * x - intercept).std()))

    def deviations(self, mass: np.ndarray, value: np.ndarray) -> np.ndarray:
        """Standard deviations above the mean at this mass, within [-2, 2]."""
        if self.deviation < 1e-6:  # all alike, but for rounding
            return np.zeros(len(mass))
        excess = np.log10(value) - self.intercept - self.slope * np.log10(mass)
        return np.clip(excess / self.deviation, -2.0, 2.0)


@dataclass(frozen=True)
class Trends:
    """Mean relations with mass of a simulation's halos."""

    concentration: Trend
    formation: Trend

    @classmethod
    def measure(cls, mass: np.ndarray, concentration: np.ndarray, formation_redshift: np.ndarray) -> "Trends":
        """From all halos of a simulation, in the order of their numbers."""
        return cls(Trend.measure(mass, concentration), Trend.measure(mass, 1.0 + formation_redshift))


def environment(overdensity: np.ndarray) -> np.ndarray:
    """Overdensity within 3 Mpc/h as standard deviations of its logarithm, within [-2, 2]."""
    return np.clip((np.log10(np.maximum(1.0 + overdensity, 1e-3)) - 0.1) / 0.4, -2.0, 2.0)


# Moster et al. (2013), table 1: what z / (1 + z) adds to log10 M1, N, beta and gamma
_PIVOT_EVOLUTION, _EFFICIENCY_EVOLUTION, _LOW_EVOLUTION, _HIGH_EVOLUTION = 1.195, -0.0247, -0.826, 0.329


def mean_stellar_mass(
    halo_mass: np.ndarray, physics: Physics, feedback: dict[str, float], h: float, redshift: float = 0.0
) -> np.ndarray:
    """Stellar mass [Msun/h] of a central galaxy in an average halo of ``halo_mass`` [Msun/h].

    With redshift the relation changes as that of Moster et al. (2013) does.

    Supernovae (A_SN1: energy, A_SN2: wind speed) take stars from small halos, black holes (A_AGN1: energy,
    A_AGN2: jet speed) from large ones.
    """
    mass = np.asarray(halo_mass) / h
    past = redshift / (1.0 + redshift)
    x = mass / (physics.pivot_mass * 10 ** (_PIVOT_EVOLUTION * past))
    low, high = physics.low_slope + _LOW_EVOLUTION * past, physics.high_slope + _HIGH_EVOLUTION * past
    stars = 2.0 * (physics.efficiency + _EFFICIENCY_EVOLUTION * past) * mass / (x**-low + x**high)
    supernova_mass = physics.supernova_mass * feedback["A_SN2"] ** 0.5  # faster winds leave larger halos
    weight = 1.0 / (1.0 + mass / supernova_mass)
    stars = stars * (feedback["A_SN1"] * feedback["A_SN2"] ** 0.5) ** (-physics.supernova_strength * weight)
    weight = 1.0 / (1.0 + physics.agn_mass / mass)
    stars = stars * (feedback["A_AGN1"] * feedback["A_AGN2"] ** 0.7) ** (-physics.agn_strength * weight)
    return stars * h


def populate(
    halos: Halos,
    members: Members,
    trends: Trends,
    *,
    physics: Physics,
    feedback: dict[str, float],
    h: float,
    seed: int,
    redshift: float = 0.0,
    age: float = 1.0,
) -> Galaxies:
    """Galaxies of these halos.

    Parameters
    ----------
    halos, members
        the halos of this rank and their particles.
    trends
        of all halos of the simulation.
    feedback
        A_SN1, A_AGN1, A_SN2, A_AGN2; 1 is fiducial.
    seed
        of the simulation.
    redshift, age
        of the halos; age of the universe then, in units of today's.
    """
    from scipy import stats  # a quarter of a second that validating a run file need not spend

    density = environment(halos.overdensity)
    early = trends.formation.deviations(halos.mass, 1.0 + halos.formation_redshift)
    compactness = trends.concentration.deviations(halos.mass, halos.concentration)
    shift = physics.environment * density + physics.formation * early + physics.concentration * compactness

    # a Poisson number of satellites in each halo, fewer where it formed early, then a row for each galaxy
    smallest = MINIMUM_PARTICLES / np.maximum(halos.length, 1)  # of the host's mass
    mean = physics.satellite_survival * _subhalos_above(smallest)
    mean *= 10 ** (physics.satellite_environment * density - 0.1 * early)
    count = stats.poisson.ppf(uniform(seed, halos.identity, 0), mean).astype("i8")
    row = np.repeat(np.arange(len(halos)), count + 1)
    place = np.arange(len(row)) - np.repeat(np.cumsum(count + 1) - (count + 1), count + 1)
    central = place == 0
    identity, draws = halos.identity[row], place * _SATELLITE_DRAWS

    fraction = _subhalo_fraction(uniform(seed, identity, draws + 1), smallest[row])
    mass = halos.mass[row] * np.where(central, 1.0, fraction)
    stars = mean_stellar_mass(mass, physics, feedback, h, redshift)
    stars *= 10 ** (shift[row] + physics.scatter * normal(seed, identity, draws + 2))

    # a satellite rides on a particle of its halo
    particle = (uniform(seed, identity, draws + 3) * halos.length[row]).astype("i8") + members.offset[row]
    position = np.where(central[:, None], halos.position[row], members.position[particle])
    velocity = np.where(central[:, None], halos.velocity[row], members.velocity[particle])

    log_stars = np.log10(stars / h)
    quiescent = _quiescence(log_stars, central, density[row], early[row], physics, feedback)
    red = uniform(seed, identity, draws + 4) < quiescent
    noise = normal(seed, identity, draws + 5)
    color = np.where(
        red, 1.10 + 0.06 * (log_stars - 10.0) + 0.05 * noise, 0.65 + 0.12 * (log_stars - 10.0) + 0.1 * noise
    )
    rate = _star_formation_rate(log_stars, red, normal(seed, identity, draws + 6), _PRESENT_AGE * age)
    # Kravtsov (2013): 0.015 R200, wider in halos that spin (Mo, Mao & White 1998), smaller when quiescent
    virial = halos.half_mass_radius[row] * 2.0 * np.where(central, 1.0, fraction) ** (1 / 3)
    spin = np.clip(halos.spin[row] / 0.035, 0.2, 5.0)
    radius = (
        0.015 * virial * spin**0.4 * np.where(red, 0.7, 1.1) * 10 ** (0.1 * normal(seed, identity, draws + 7))
    )

    scale = np.where(central, 1.0, fraction) ** (1 / 3)
    galaxies = Galaxies(
        halo=halos.number[row],
        is_central=central,
        position=position,
        velocity=velocity,
        stellar_mass=stars,
        star_formation_rate=rate,
        color_gi=color,
        half_mass_radius=radius,
        magnitudes=_magnitudes(log_stars, color),
        v_max=halos.v_max[row] * scale,
        velocity_dispersion=halos.velocity_dispersion[row] * scale,
    )
    return galaxies.take(np.lexsort((-stars, ~central, row)))


def uniform(seed: int, identity: np.ndarray, draw: np.ndarray | int) -> np.ndarray:
    """Numbers in (0, 1) of (seed, identity, draw) alone: SplitMix64 (Steele, Lea & Flood 2014)."""
    state = np.asarray(identity).astype("u8")
    state = _mix(state + _mix(np.array([seed], "u8")))
    state = _mix(state + _mix(np.atleast_1d(draw).astype("u8") + np.uint64(1)))
    return ((state >> np.uint64(11)).astype("f8") + 0.5) * 2.0**-53


def normal(seed: int, identity: np.ndarray, draw: np.ndarray | int) -> np.ndarray:
    """Standard normal numbers that depend on (seed, identity, draw) alone."""
    return special.ndtri(uniform(seed, identity, draw))


def _mix(x: np.ndarray) -> np.ndarray:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


# Giocoli et al. (2008), eq. 3: dN/dln(m/M) = N0 x^-alpha exp(-6.283 x^3), x = m / (alpha M)
_N0, _ALPHA = 0.21, 0.8
_FRACTION = np.geomspace(1e-6, 1.0, 2000)
_RATE = _N0 * (_FRACTION / _ALPHA) ** -_ALPHA * np.exp(-6.283 * (_FRACTION / _ALPHA) ** 3)
_ABOVE = np.concatenate(
    (np.cumsum((0.5 * (_RATE[1:] + _RATE[:-1]) * np.diff(np.log(_FRACTION)))[::-1])[::-1], [0.0])
)


def _subhalos_above(fraction: np.ndarray) -> np.ndarray:
    """Mean number of subhalos of more than this fraction of their host's mass."""
    return np.interp(fraction, _FRACTION, _ABOVE)


def _subhalo_fraction(u: np.ndarray, smallest: np.ndarray) -> np.ndarray:
    """Mass fractions of subhalos above ``smallest``, by inverting their cumulative number at ``u``."""
    return np.interp(u * _subhalos_above(smallest), _ABOVE[::-1], _FRACTION[::-1])


def _quiescence(
    log_stars: np.ndarray,
    central: np.ndarray,
    density: np.ndarray,
    early: np.ndarray,
    physics: Physics,
    feedback: dict[str, float],
) -> np.ndarray:
    """Probability of no star formation: it rises with stellar mass, environment and early formation."""
    pivot = np.log10(physics.quenching_mass) - 0.3 * np.log10(feedback["A_AGN1"] * feedback["A_AGN2"])
    x = (log_stars - pivot) / physics.quenching_width + 0.5 * early + np.where(central, 0.3, 0.8) * density
    return special.expit(x + np.where(central, 0.0, 0.7))


def _star_formation_rate(log_stars: np.ndarray, red: np.ndarray, noise: np.ndarray, age: float) -> np.ndarray:
    """Main sequence in a universe of ``age`` [Gyr] (Speagle et al. 2014, arXiv:1405.2041), 1.7 dex lower if
    quiescent [Msun/yr]."""
    sequence = (0.84 - 0.026 * age) * log_stars - (6.51 - 0.11 * age)
    rate = 10 ** (sequence + np.where(red, -1.7 + 0.4 * noise, 0.25 * noise))
    return np.where(red & (noise < -1.0), 0.0, rate)  # below what a particle of gas would form


def _magnitudes(log_stars: np.ndarray, color_gi: np.ndarray) -> np.ndarray:
    """(n, 8) absolute magnitudes: i from the mass-to-light ratio of Taylor et al. (2011, arXiv:1108.0635, eq.
    8), the other bands by straight lines in g-i through blue (0.6) and red (1.2) galaxies."""
    i = (1.15 + 0.70 * color_gi - log_stars) / 0.4
    lines = {
        "U": (0.85, 1.35),
        "B": (0.25, 1.0),
        "V": (0.05, 0.65),
        "K": (-1.9, 0.0),
        "r": (0.02, 0.28),
        "z": (0.0, -0.2),
    }
    band = {name: i + zero + slope * color_gi for name, (zero, slope) in lines.items()}
    band |= {"g": i + color_gi, "i": i}
    return np.stack([band[name] for name in PHOTOMETRIC_BANDS], axis=1)
