"""The mock galaxy formation model: what galaxies depend on, and what they must not depend on."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from galdist.simulations import formation
from galdist.simulations.halos import Halos, Members

FIDUCIAL = dict.fromkeys(formation.FEEDBACK, 1.0)
H = 0.6711


def make_halos(n, seed=0, mass=None, **columns):
    """n halos of random properties (or all of one mass), with their particles in a ball."""
    rng = np.random.default_rng(seed)
    length = rng.integers(20, 400, n) if mass is None else np.full(n, 200)
    mass = 5e9 * length if mass is None else np.full(n, float(mass))
    position = rng.uniform(0, 25, (n, 3))
    values = {name: np.ones(n) for name in Halos.__dataclass_fields__}
    values |= {
        "number": np.arange(n),
        "identity": rng.permutation(10 * n)[:n],
        "length": length,
        "mass": mass,
        "position": position,
        "velocity": rng.normal(0, 100, (n, 3)),
        "half_mass_radius": 0.1 * (mass / 1e12) ** (1 / 3),
        "spin": np.full(n, 0.035),
        "concentration": 10 ** rng.normal(0.8, 0.1, n),
        "formation_redshift": rng.uniform(0.3, 2.0, n),
        "overdensity": 10 ** rng.normal(0.1, 0.4, n) - 1,
        "v_max": 100 * (mass / 1e12) ** (1 / 3),
        "velocity_dispersion": 60 * (mass / 1e12) ** (1 / 3),
    }
    halos = Halos(**{**values, **columns})
    offset = np.concatenate(([0], np.cumsum(length)))
    owner = np.repeat(np.arange(n), length)
    members = Members(
        offset,
        np.arange(offset[-1]),
        position[owner] + rng.normal(0, 0.1, (offset[-1], 3)),
        halos.velocity[owner] + rng.normal(0, 50, (offset[-1], 3)),
    )
    return halos, members


def populate(halos, members, suite="MockA", feedback=FIDUCIAL, seed=1):
    trends = formation.Trends.measure(halos.mass, halos.concentration, halos.formation_redshift)
    return formation.populate(
        halos, members, trends, physics=formation.PHYSICS[suite], feedback=feedback, h=H, seed=seed
    )


class TestRedshift:
    @pytest.mark.parametrize(
        ("redshift", "pivot", "efficiency"),
        [(0.0, 11.59, 0.0351), (1.0, 12.1875, 0.02275), (3.0, 12.48625, 0.016575)],
    )
    def test_the_relation_of_moster_naab_and_white(self, redshift, pivot, efficiency):
        """At their pivot mass the share of stars is N: table 1 and eqs. 11 and 12, by hand."""
        mass = np.array([10**pivot])
        none = dataclasses.replace(formation.PHYSICS["MockA"], supernova_strength=0.0, agn_strength=0.0)
        stars = formation.mean_stellar_mass(mass * H, none, FIDUCIAL, H, redshift) / H
        np.testing.assert_allclose(stars / mass, efficiency, rtol=1e-12)

    def test_halos_of_one_mass_had_fewer_stars_and_formed_more(self):
        halos, members = make_halos(300)
        trends = formation.Trends.measure(halos.mass, halos.concentration, halos.formation_redshift)
        options = {"physics": formation.PHYSICS["MockA"], "feedback": FIDUCIAL, "h": H, "seed": 1}
        now = formation.populate(halos, members, trends, **options)
        then = formation.populate(halos, members, trends, **options, redshift=1.0, age=0.43)
        assert (now.halo == then.halo).all(), "the same satellites"
        small = halos.mass[now.halo] < 1e12
        assert (then.stellar_mass[small & now.is_central] < now.stellar_mass[small & now.is_central]).all()
        forming = (now.star_formation_rate > 0) & (then.star_formation_rate > 0)
        specific = [np.median((one.star_formation_rate / one.stellar_mass)[forming]) for one in (now, then)]
        assert specific[1] > 3 * specific[0]


class TestRandomNumbers:
    @given(seed=st.integers(0, 2**31), draw=st.integers(0, 10**6))
    @settings(max_examples=25, deadline=None)
    def test_each_halo_has_its_own(self, seed, draw):
        identity = np.arange(500)
        numbers = formation.uniform(seed, identity, draw)
        assert ((numbers > 0) & (numbers < 1)).all()
        assert len(np.unique(numbers)) == 500
        order = np.random.default_rng(0).permutation(500)
        assert (formation.uniform(seed, identity[order], draw) == numbers[order]).all()
        assert abs(np.corrcoef(numbers, formation.uniform(seed, identity, draw + 1))[0, 1]) < 0.25
        assert abs(np.corrcoef(numbers, formation.uniform(seed + 1, identity, draw))[0, 1]) < 0.25

    def test_distributions(self):
        numbers = formation.uniform(7, np.arange(100_000), 3)
        counts = np.bincount((numbers * 20).astype(int))
        assert np.abs(counts - 5000).max() < 5 * 5000**0.5
        normal = formation.normal(7, np.arange(100_000), 3)
        assert normal.mean() == pytest.approx(0, abs=0.02)
        assert normal.std() == pytest.approx(1, abs=0.02)


class TestStellarMass:
    def test_fiducial_is_moster(self):
        # eq. 2 of Moster et al. (2013): at the pivot the ratio is N
        physics = formation.PHYSICS["MockA"]
        halo = physics.pivot_mass * H
        assert formation.mean_stellar_mass(halo, physics, FIDUCIAL, H) / halo == pytest.approx(
            physics.efficiency
        )

    @pytest.mark.parametrize("suite", formation.PHYSICS)
    @pytest.mark.parametrize(
        ("name", "affected", "spared"),
        [("A_SN1", 1e11, 1e14), ("A_SN2", 1e11, 1e14), ("A_AGN1", 1e14, 1e11), ("A_AGN2", 1e14, 1e11)],
    )
    def test_feedback_takes_stars_where_it_acts(self, suite, name, affected, spared):
        def stars(halo, value):
            return formation.mean_stellar_mass(halo, formation.PHYSICS[suite], {**FIDUCIAL, name: value}, H)

        assert stars(affected, 2.0) < 0.95 * stars(affected, 1.0) < 0.91 * stars(affected, 0.5)
        assert stars(spared, 2.0) == pytest.approx(stars(spared, 0.5), rel=0.05)

    @pytest.mark.parametrize("suite", formation.PHYSICS)
    def test_rises_with_halo_mass(self, suite):
        stars = formation.mean_stellar_mass(
            np.geomspace(1e10, 1e15, 50), formation.PHYSICS[suite], FIDUCIAL, H
        )
        assert (np.diff(stars) > 0).all()

    def test_suites_differ(self):
        halos, members = make_halos(300)
        a, b = (np.log10(populate(halos, members, suite).stellar_mass).mean() for suite in formation.PHYSICS)
        assert abs(a - b) > 0.05


class TestGalaxies:
    def test_one_central_a_halo_at_its_density_peak(self):
        halos, members = make_halos(300)
        galaxies = populate(halos, members)
        central = galaxies.is_central
        assert (galaxies.halo[central] == halos.number).all()
        assert (galaxies.position[central] == halos.position).all()
        assert (galaxies.velocity[central] == halos.velocity).all()

    def test_satellites_ride_on_particles_of_their_halo(self):
        halos, members = make_halos(300)
        galaxies = populate(halos, members)
        satellites = galaxies.take(~galaxies.is_central)
        assert len(satellites) > 50
        for halo, position, velocity in zip(
            satellites.halo, satellites.position, satellites.velocity, strict=True
        ):
            own = slice(*members.offset[halo : halo + 2])
            here = np.flatnonzero((members.position[own] == position).all(axis=1))
            assert len(here) == 1
            assert (members.velocity[own][here[0]] == velocity).all()

    def test_order(self):
        galaxies = populate(*make_halos(300))
        assert (np.diff(galaxies.halo) >= 0).all()
        first = np.concatenate(([True], np.diff(galaxies.halo) > 0))
        assert (galaxies.is_central == first).all()
        falling = np.diff(galaxies.stellar_mass) <= 0
        assert falling[~first[1:] & ~first[:-1]].all()

    def test_does_not_depend_on_the_partition_of_halos(self):
        halos, members = make_halos(200)
        trends = formation.Trends.measure(halos.mass, halos.concentration, halos.formation_redshift)
        options = {"physics": formation.PHYSICS["MockA"], "feedback": FIDUCIAL, "h": H, "seed": 1}
        whole = formation.populate(halos, members, trends, **options)
        parts = []
        for rows in (np.arange(0, 200, 2), np.arange(1, 200, 2)):
            particles = np.concatenate([np.arange(*members.offset[i : i + 2]) for i in rows])
            offset = np.concatenate(([0], np.cumsum(halos.length[rows])))
            part = Members(
                offset, *(getattr(members, name)[particles] for name in ("ids", "position", "velocity"))
            )
            parts.append(formation.populate(halos.take(rows), part, trends, **options))
        joined = formation.Galaxies.concatenate(parts)
        joined = joined.take(np.argsort(joined.halo, kind="stable"))
        for name in formation.Galaxies.__dataclass_fields__:
            assert (getattr(joined, name) == getattr(whole, name)).all(), name

    def test_seed(self):
        halos, members = make_halos(100)
        first, again, other = (populate(halos, members, seed=seed) for seed in (1, 1, 2))
        assert (first.stellar_mass == again.stellar_mass).all()
        assert len(first) != len(other) or (first.stellar_mass != other.stellar_mass).any()

    @pytest.mark.parametrize("suite", formation.PHYSICS)
    def test_halos_of_one_mass_hold_more_galaxies_in_dense_places(self, suite):
        """What a halo occupation of mass alone cannot know."""
        mass = np.geomspace(1e11, 1e12, 200)
        mass = np.interp(2e9, formation.mean_stellar_mass(mass, formation.PHYSICS[suite], FIDUCIAL, H), mass)
        count = []
        for density in (-0.7, 4.0):  # a void, and the outskirts of a cluster
            halos, members = make_halos(2000, mass=mass, overdensity=np.full(2000, density))
            count.append((populate(halos, members, suite).stellar_mass > 2e9).sum())
        assert count[1] > 3 * count[0] > 0

    @pytest.mark.parametrize("column", ["formation_redshift", "concentration"])
    def test_stars_depend_on_the_history_at_fixed_mass(self, column):
        halos, members = make_halos(4000, mass=1e12, overdensity=np.zeros(4000))
        galaxies = populate(halos, members)
        stars = np.log10(galaxies.stellar_mass[galaxies.is_central])
        value = getattr(halos, column)
        assert stars[value > np.median(value)].mean() > stars[value < np.median(value)].mean() + 0.02

    def test_scatter_at_fixed_halo_properties(self):
        same = {
            "overdensity": np.zeros(3000),
            "concentration": np.full(3000, 8.0),
            "formation_redshift": np.ones(3000),
        }
        halos, members = make_halos(3000, mass=1e12, **same)
        galaxies = populate(halos, members)
        stars = np.log10(galaxies.stellar_mass[galaxies.is_central])
        assert stars.std() == pytest.approx(formation.PHYSICS["MockA"].scatter, rel=0.1)

    def test_number_of_satellites_is_that_of_surviving_subhalos(self):
        same = {"overdensity": np.full(3000, 10**0.1 - 1), "concentration": np.full(3000, 8.0)}
        halos, members = make_halos(3000, mass=1e13, formation_redshift=np.ones(3000), **same)
        galaxies = populate(halos, members)
        # Giocoli et al. (2008): 0.21 x^-0.8 exp(-6.283 x^3) a ln m, x = m / 0.8 M, above 20 of 200 particles
        ln_m = np.linspace(np.log(0.1), 0, 10_000)
        x = np.exp(ln_m) / 0.8
        expected = formation.PHYSICS["MockA"].satellite_survival * np.trapezoid(
            0.21 * x**-0.8 * np.exp(-6.283 * x**3), ln_m
        )
        mean = (~galaxies.is_central).sum() / 3000
        assert mean == pytest.approx(expected, abs=4 * (expected / 3000) ** 0.5)

    def test_red_and_blue(self):
        halos, members = make_halos(3000, seed=2)
        galaxies = populate(halos, members)
        red = galaxies.color_gi > 0.9
        assert 0.05 < red.mean() < 0.95
        assert np.median(galaxies.star_formation_rate[red]) < 0.1 * np.median(
            galaxies.star_formation_rate[~red]
        )
        assert (galaxies.star_formation_rate >= 0).all()
        massive = galaxies.stellar_mass > np.percentile(galaxies.stellar_mass, 80)
        assert red[massive].mean() > red[~massive].mean()
        more = populate(halos, members, feedback={**FIDUCIAL, "A_AGN1": 4.0})
        assert (more.color_gi > 0.9).mean() > red.mean()

    def test_magnitudes(self):
        galaxies = populate(*make_halos(300))
        band = dict(zip(formation.PHOTOMETRIC_BANDS, galaxies.magnitudes.T, strict=True))
        np.testing.assert_allclose(band["g"] - band["i"], galaxies.color_gi)
        assert (band["g"] > band["r"]).all()
        assert (band["r"] > band["i"]).all()
        # Taylor et al. (2011), eq. 8, gives the stellar mass [Msun] back
        stars = 10 ** (1.15 + 0.70 * galaxies.color_gi - 0.4 * band["i"])
        np.testing.assert_allclose(stars, galaxies.stellar_mass / H)

    def test_no_halos(self):
        assert len(populate(*make_halos(0))) == 0
