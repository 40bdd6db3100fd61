"""Halos with their central galaxies: from tables and group catalogues to rows in splits."""

import csv
import json
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy.optimize import brentq
from universe import REDSHIFTS, write_camels, write_trees

from galdist.catalogs.catalog import CatalogConfig, CatalogWriter, catalog, open_catalog
from galdist.catalogs.centrals import (
    SPLITS,
    Centrals,
    CentralsConfig,
    SimulationsSplit,
    centrals,
    read_centrals,
    split_rows,
    split_simulations,
)
from galdist.catalogs.columns import ColumnSource, load_columns
from galdist.catalogs.structure import bullock_spin, nfw_concentration
from galdist.grids.store import SimulationAttrs, StoreError
from galdist.simulations.simulation import SimulationError
from galdist.statistics.tracers import tracer

COLUMNS = {
    "log_halo_mass": "M_h",
    "log_stellar_mass": "smass",
    "color_gi": "color",
    "log_ssfr": "sSFR",
}
PARTS = ("train", "validation", "test")


def table(n: int = 400, seed: int = 0) -> pandas.DataFrame:
    rng = np.random.default_rng(seed)
    position = rng.uniform(0, 50, (n, 3))
    return pandas.DataFrame(
        {
            "X": position[:, 0].astype("f4"),
            "Y": position[:, 1].astype("f4"),
            "Z": position[:, 2].astype("f4"),
            "M_h": rng.uniform(10.5, 14, n).astype("f4"),
            "smass": rng.uniform(8.8, 11.5, n).astype("f4"),
            "color": rng.uniform(0.2, 1.2, n),
            "sSFR": rng.uniform(-12, -9, n),
            "is_central": rng.random(n) < 0.7,
            "sim": np.arange(n) % 4,
        }
    )


def run(file: Path, out: Path, config: dict[str, Any] | None = None, **source: Any) -> Path:
    """Run the stage on one table."""
    given = {
        "simulation": "Box",
        "file": file,
        "box_size": 50,
        "position": ["X", "Y", "Z"],
        "columns": COLUMNS,
        **source,
    }
    out.mkdir(exist_ok=True)
    centrals(CentralsConfig.model_validate({"tables": [given], "seed": 3, **(config or {})}), {}, out)
    return out


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    table().to_parquet(tmp_path / "table.parquet")
    return tmp_path / "table.parquet"


def write(frame: pandas.DataFrame, file: Path) -> Path:
    if file.suffix == ".parquet":
        frame.to_parquet(file)
    elif file.suffix == ".csv":
        frame.to_csv(file, index=False)
    else:
        with h5py.File(file, "w") as hdf5:
            for name in frame:
                hdf5[f"halos/{name}"] = frame[name].to_numpy()
    return file


@pytest.mark.parametrize("suffix", ["parquet", "csv", "hdf5"])
def test_a_table_arrives_as_it_is(tmp_path: Path, suffix: str) -> None:
    frame = table()
    file = write(frame, tmp_path / f"table.{suffix}")
    step = run(file, tmp_path / "out", **({"key": "halos"} if suffix == "hdf5" else {}))
    held = read_centrals([step], [*COLUMNS, "position"], None)
    assert len(held) == len(frame)
    for name, source in COLUMNS.items():
        np.testing.assert_allclose(held.columns[name], frame[source], rtol=1e-6)
    np.testing.assert_allclose(held.columns["position"], frame[["X", "Y", "Z"]], rtol=1e-6)
    assert held.units["log_halo_mass"] == "log10 Msun/h"
    assert held.source_columns["log_halo_mass"] == "M_h"
    np.testing.assert_array_equal(held.row, np.arange(len(frame)))


def test_splits_of_reading_are_disjoint_and_complete(parquet: Path, tmp_path: Path) -> None:
    step = run(parquet, tmp_path / "out")
    rows = [read_centrals([step], ["color_gi"], split).row for split in PARTS]
    np.testing.assert_array_equal(np.sort(np.concatenate(rows)), np.arange(400))
    assert SPLITS == PARTS
    stored = open_catalog(step / "catalog.zarr").table("Box", "centrals", ["split"])["split"]
    assert stored.dtype == np.int8
    for place, each in enumerate(rows):
        np.testing.assert_array_equal(each, np.flatnonzero(stored == place))


def test_the_same_seed_gives_the_same_rows_and_another_does_not(parquet: Path, tmp_path: Path) -> None:
    once, again = (read_centrals([run(parquet, tmp_path / name)], ["log_ssfr"], "test") for name in "ab")
    np.testing.assert_array_equal(once.row, again.row)
    other = read_centrals([run(parquet, tmp_path / "c", {"seed": 4})], ["log_ssfr"], "test")
    assert not np.array_equal(once.row, other.row)


@settings(max_examples=100, deadline=None)
@given(
    counts=st.lists(st.integers(0, 60), min_size=1, max_size=8),
    validation=st.floats(0, 0.45),
    test=st.floats(0, 0.45),
    seed=st.integers(0, 2**31),
)
def test_a_stratified_split_has_the_fractions_to_within_one_row_a_stratum(
    counts: list[int], validation: float, test: float, seed: int
) -> None:
    strata = (
        np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts)).astype(np.int8)
    )
    split = split_rows(strata, validation, test, np.random.default_rng(seed))
    assert split.shape == strata.shape
    for stratum, n in enumerate(counts):
        for part, fraction in zip(range(3), (1 - validation - test, validation, test), strict=True):
            found = np.count_nonzero(split[strata == stratum] == part)
            assert abs(found - fraction * n) < 1 + 1e-9


def test_small_strata_are_in_the_test_split_as_often_as_the_fraction_says() -> None:
    """Rounding to the nearest would never put the only galaxy of a stratum there."""
    strata = np.arange(20_000)
    split = split_rows(strata, 0.15, 0.15, np.random.default_rng(0))
    np.testing.assert_allclose(np.bincount(split) / strata.size, [0.7, 0.15, 0.15], atol=0.01)


def test_a_split_over_tracers_has_the_same_mix_of_galaxies_in_each_part(tmp_path: Path) -> None:
    file = write(table(2000), tmp_path / "t.parquet")
    columns = ["log_stellar_mass", "color_gi"]
    step = run(file, tmp_path / "out")
    parts = {split: read_centrals([step], columns, split).columns for split in PARTS}
    mix = {split: np.bincount(tracer(*part.values()), minlength=8) for split, part in parts.items()}
    total = sum(mix.values())
    for split, fraction in zip(PARTS, (0.7, 0.15, 0.15), strict=True):
        assert np.all(np.abs(mix[split] - fraction * total) <= 1)


def test_null_rates_are_drawn_and_the_others_kept(tmp_path: Path) -> None:
    frame = table(4000)
    frame.loc[::4, "sSFR"] = np.nan
    frame.loc[1::4, "sSFR"] = -np.inf
    frame.loc[2::4, "sSFR"] = -99.0
    file = write(frame, tmp_path / "t.parquet")
    step = run(file, tmp_path / "out", {"null_ssfr": {"values": [-99]}})
    found = read_centrals([step], ["log_ssfr"], None).columns["log_ssfr"]
    np.testing.assert_array_equal(found[3::4], frame["sSFR"][3::4])
    drawn = found[np.arange(4000) % 4 != 3]
    assert drawn.mean() == pytest.approx(-13.5, abs=5 * 0.5 / np.sqrt(3000))
    assert drawn.std() == pytest.approx(0.5, rel=0.1)
    facts = open_catalog(step / "catalog.zarr").facts("Box", "centrals")
    assert (facts["null_ssfr"]["filled"], facts["null_ssfr"]["seed"]) == (3000, 3)
    again = read_centrals([run(file, tmp_path / "b", {"null_ssfr": {"values": [-99]}})], ["log_ssfr"], None)
    np.testing.assert_array_equal(again.columns["log_ssfr"], found)


def test_null_rates_of_a_column_in_single_precision(tmp_path: Path) -> None:
    frame = table().assign(sSFR=lambda t: t["sSFR"].astype("f4"))
    frame.loc[::2, "sSFR"] = np.float32(-99.9)
    step = run(write(frame, tmp_path / "t.parquet"), tmp_path / "out", {"null_ssfr": {"values": [-99.9]}})
    assert open_catalog(step / "catalog.zarr").facts("Box", "centrals")["null_ssfr"]["filled"] == 200


def test_linear_units_and_quotients(tmp_path: Path) -> None:
    frame = table().assign(
        mass=lambda t: 10 ** t["M_h"].astype(float) / 1e10,
        rate=lambda t: 10 ** (t["sSFR"] + t["smass"].astype(float)),
        stars=lambda t: 10 ** t["smass"].astype(float),
        kpc=lambda t: t["X"] * 1e3,
    )
    columns = {
        "log_halo_mass": {"column": "mass", "scale": 1e10, "log10": True},
        "log_ssfr": {"column": "rate", "per": "stars", "log10": True},
        "log_stellar_mass": "smass",
        "color_gi": "color",
        "temperature": {"column": "color", "units": "K"},
    }
    position = {"columns": ["kpc", "kpc", "kpc"], "scale": 1e-3}
    file = write(frame, tmp_path / "t.parquet")
    held = read_centrals(
        [run(file, tmp_path / "out", columns=columns, position=position)], [*columns, "position"], None
    )
    np.testing.assert_allclose(held.columns["log_halo_mass"], frame["M_h"], rtol=1e-6)
    np.testing.assert_allclose(held.columns["log_ssfr"], frame["sSFR"], rtol=1e-6)
    np.testing.assert_allclose(held.columns["position"][:, 1], frame["X"], rtol=1e-6)
    assert held.units["temperature"] == "K"
    assert held.source_columns["log_halo_mass"] == "mass"
    assert held.source_columns["log_ssfr"] == "log_ssfr", "a quotient cannot be written back"


@given(
    values=st.lists(st.floats(0.1, 10), min_size=1, max_size=5),
    scale=st.floats(1e-3, 1e10),
    log10=st.booleans(),
)
def test_what_is_read_can_be_written_back(values: list[float], scale: float, log10: bool) -> None:
    source = ColumnSource(column="x", scale=scale, log10=log10)
    given = {"x": np.array(values)}
    np.testing.assert_allclose(source.restore(source.read(given, "here")), given["x"], rtol=1e-9)


def test_a_component_of_a_vector(tmp_path: Path) -> None:
    frame = table(50)
    with h5py.File(tmp_path / "t.hdf5", "w") as hdf5:
        for name in frame:
            hdf5[name] = frame[name].to_numpy()
        hdf5["masses"] = np.stack([frame["smass"] * 0, frame["smass"]], axis=1)
        hdf5["place"] = frame[["X", "Y", "Z"]].to_numpy()
    columns = {**COLUMNS, "log_stellar_mass": {"column": "masses", "component": 1}}
    step = run(tmp_path / "t.hdf5", tmp_path / "out", columns=columns, position="place")
    held = read_centrals([step], ["log_stellar_mass", "position"], None)
    np.testing.assert_array_equal(held.columns["log_stellar_mass"], frame["smass"])
    np.testing.assert_array_equal(held.columns["position"], frame[["X", "Y", "Z"]])
    with pytest.raises(SimulationError, match="2 components: name one"):
        run(tmp_path / "t.hdf5", tmp_path / "b", columns={**COLUMNS, "log_stellar_mass": "masses"})


def test_a_minimum_leaves_out_and_counts_what_is_no_number(tmp_path: Path) -> None:
    frame = table()
    frame.loc[[3, 5, 200], "color"] = np.nan
    file = write(frame, tmp_path / "t.parquet")
    with pytest.raises(SimulationError, match="a `minimum` of this column does it for NaN"):
        run(file, tmp_path / "out")
    step = run(file, tmp_path / "out", {"minimum": {"color_gi": -3}})
    found = read_centrals([step], ["color_gi"], None).columns["color_gi"]
    np.testing.assert_array_equal(found, frame["color"].dropna())
    assert open_catalog(step / "catalog.zarr").facts("Box", "centrals")["minimum_nan"] == {"color_gi": 3}


@pytest.mark.parametrize("change", [{"smass": 99.0}, {"smass": np.inf}, {"X": 60.0}, {"stars": -1.0}])
def test_errors_name_the_rows_of_the_file(tmp_path: Path, change: dict[str, float]) -> None:
    frame = table().assign(stars=1e10)
    row = 201
    frame.loc[row, ["M_h", "is_central", *change]] = [13.0, True, *change.values()]
    columns = COLUMNS | {"stars": {"column": "stars", "log10": True}}
    source = {"columns": columns, "filter": {"is_central": True}, "simulation_column": "sim"}
    with pytest.raises(SimulationError, match=rf"\(row {row}: "):
        run(
            write(frame, tmp_path / "t.parquet"),
            tmp_path / "out",
            {"minimum": {"log_halo_mass": 12}},
            **source,
        )


def test_what_to_cite_is_kept(parquet: Path, tmp_path: Path) -> None:
    step = run(parquet, tmp_path / "out", citation="Somebody (2020)")
    assert open_catalog(step / "catalog.zarr").facts("Box", "centrals")["citation"] == "Somebody (2020)"


def test_rows_left_out(parquet: Path, tmp_path: Path) -> None:
    frame = table()
    step = run(parquet, tmp_path / "out", {"minimum": {"log_halo_mass": 12}}, filter={"is_central": True})
    kept = frame[frame["is_central"] & (frame["M_h"] >= 12)]
    np.testing.assert_array_equal(
        read_centrals([step], ["log_halo_mass"], None).columns["log_halo_mass"], kept["M_h"]
    )
    facts = open_catalog(step / "catalog.zarr").facts("Box", "centrals")
    assert (facts["rows_read"], facts["rows_of_simulation"]) == (400, frame["is_central"].sum())


def test_the_environment_is_that_of_all_rows(tmp_path: Path) -> None:
    """Also of those that the filter leaves out."""
    frame = pandas.DataFrame({"X": [1.0, 2, 3, 25], "Y": 1.0, "Z": 1.0, "M_h": 12.0, "keep": [1, 0, 0, 1]})
    frame["weight"] = [1.0, 2, 3, 4]
    file = write(frame, tmp_path / "t.csv")
    settings = {"columns": {"log_halo_mass": "M_h"}, "filter": {"keep": 1}}
    mean = 4 / 3 * np.pi * 1.5**3 / 50**3
    for name, weight, expected in (("a", None, [2 / 4, 1 / 4]), ("b", "weight", [3 / 10, 4 / 10])):
        step = run(
            file,
            tmp_path / name,
            {"split": {"kind": "rows", "validation": 0, "test": 0}},
            overdensity={"radius": 1.5, "weight": weight},
            **settings,
        )
        found = read_centrals([step], ["overdensity"], "train").columns["overdensity"]
        np.testing.assert_allclose(found, np.array(expected) / mean)


class TestSeveralSimulations:
    @pytest.fixture
    def step(self, parquet: Path, tmp_path: Path) -> Path:
        (tmp_path / "parameters.csv").write_text(
            "name,Omega_m,sigma_8,A_SN1,n_gal,sim\n"
            + "".join(f"Box_{i},0.{i + 1},0.8,{i}.5,100,{i}\n" for i in (3, 1, 0, 2))
        )
        return run(
            parquet,
            tmp_path / "out",
            {"split": {"kind": "simulations", "validation": ["Box_1"], "test": 0.25}},
            simulation_column="sim",
            suite="Suite",
            cosmology={"h": 0.7},
            parameters={"file": tmp_path / "parameters.csv", "column": "sim"},
        )

    def test_each_has_its_rows_and_parameters(self, step: Path) -> None:
        frame = table()
        held = read_centrals([step], ["Omega_m", "h", "A_SN1", "color_gi"], None)
        assert [each.name for each in held.simulations] == [f"Box_{i}" for i in range(4)]
        for i in range(4):
            mine = held.simulation == i
            np.testing.assert_array_equal(held.columns["color_gi"][mine], frame["color"][frame["sim"] == i])
            np.testing.assert_array_equal(held.row[mine], np.arange(100))
            np.testing.assert_allclose(held.columns["Omega_m"][mine], 0.1 * (i + 1))
            np.testing.assert_allclose(held.columns["A_SN1"][mine], i + 0.5)
            np.testing.assert_allclose(held.columns["h"][mine], 0.7)
        assert "n_gal" not in held.simulations[0].astrophysics

    def test_whole_simulations_are_kept_out(self, step: Path) -> None:
        parts = {split: read_centrals([step], ["color_gi"], split) for split in PARTS}
        assert set(parts["validation"].simulation) == {1}
        assert len(set(parts["test"].simulation)) == 1
        assert sum(len(part) for part in parts.values()) == 400
        for split, part in parts.items():
            assert {part.simulations[i].split for i in part.simulation} == {split}

    def test_a_column_that_is_nowhere(self, step: Path) -> None:
        with pytest.raises(StoreError, match="column 'Omega_n' is not there; did you mean 'Omega_m'"):
            read_centrals([step], ["Omega_n"], None)

    def test_one_simulation_in_two_steps(self, step: Path) -> None:
        with pytest.raises(StoreError, match="Box_0 is in another store too"):
            read_centrals([step, step], ["color_gi"], None)


@settings(max_examples=50, deadline=None)
@given(
    n=st.integers(3, 40),
    validation=st.floats(0, 0.4),
    test=st.floats(0, 0.4),
    seed=st.integers(0, 1000),
)
def test_fractions_of_simulations(n: int, validation: float, test: float, seed: int) -> None:
    names = [f"s{i}" for i in range(n)]
    config = SimulationsSplit(kind="simulations", validation=validation, test=test)
    splits = split_simulations(names, config, seed)
    assert list(splits) == names
    assert splits == split_simulations(names, config, seed)
    for split, fraction in (("validation", validation), ("test", test)):
        assert [*splits.values()].count(split) == round(fraction * n)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"M_h": lambda t: 10 ** t["M_h"]}, "column log_halo_mass: 400 of 400 .*log10: true"),
        ({"M_h": lambda t: t["M_h"] / 10}, "not between 7 and 17 log10 Msun/h"),
        (
            {"color": lambda t: t["color"].mask(t.index == 7)},
            "column color_gi: 1 of 400 values are not finite .row 7",
        ),
        ({"over": lambda t: t["color"] - 1}, "not between 0 and 100000, as a density within 3 Mpc/h"),
        ({"X": lambda t: t["X"] * 1e3}, "outside the box .*scale of position"),
        ({"X": lambda t: t["X"] - 25}, "outside the box"),
        ({"X": lambda t: t["X"] / 1e3}, "along one axis all 400 rows lie within 0.0.*scale of position"),
        ({"smass": lambda t: t["smass"].astype(str) + "x"}, "does not hold numbers"),
    ],
)
def test_wrong_numbers_are_found(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    file = write(table().assign(**{"over": 1.0} | change), tmp_path / "t.parquet")
    with pytest.raises(SimulationError, match=message):
        run(file, tmp_path / "out", columns=COLUMNS | {"overdensity": "over"})


@pytest.mark.parametrize(
    ("source", "config", "message"),
    [
        (
            {"columns": {**COLUMNS, "color_gi": "colour"}},
            {},
            "column 'colour' is not there; did you mean 'color'",
        ),
        ({"filter": {"is_centra": 1}}, {}, "did you mean 'is_central'"),
        ({"filter": {"sim": 17}}, {}, "filter {sim: 17} leaves no row of Box"),
        ({}, {"minimum": {"log_halo_mass": 1e11}}, "leaves none of 400 rows; check the units"),
        ({}, {"minimum": {"log_halo_mas": 11}}, "did you mean 'log_halo_mass'"),
        ({"columns": {"log_halo_mass": "M_h"}}, {}, "tracers are known by .*kind: rows"),
        (
            {"columns": {"log_halo_mass": {"column": "color", "log10": True, "scale": -1}}},
            {},
            "leave `log10` out",
        ),
        ({}, {"split": {"kind": "simulations", "test": ["Bix"]}}, "did you mean 'Box'"),
        ({}, {"split": {"kind": "simulations", "test": ["Box"]}}, "none of 1 simulations is left"),
        ({}, {"split": {"kind": "catalogs"}}, "tables say nothing of splits"),
    ],
)
def test_wrong_settings_are_found(
    parquet: Path, tmp_path: Path, source: dict[str, Any], config: dict[str, Any], message: str
) -> None:
    with pytest.raises(SimulationError, match=message):
        run(parquet, tmp_path / "out", config, **source)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"columns": {}}, "name at least one"),
        ({"columns": {"position": "X"}}, "this name is taken"),
        ({"columns": {"log_halo_mass": {"column": "M_h", "units": "Msun"}}}, "is in log10 Msun/h, not Msun"),
        ({"position": ["X", "Y"]}, "expected three columns"),
        ({"overdensity": {}, "position": None}, "computing it needs position"),
        ({"parameters": {"file": "p.csv", "column": "sim"}}, "give simulation_column"),
        ({"columns": {"color_gi": {"column": "color", "scale": 0}}}, "a number that is not 0"),
    ],
)
def test_contradictions_are_found_before_work_starts(source: dict[str, Any], message: str) -> None:
    given = {"simulation": "Box", "file": "t.parquet", "box_size": 50, "position": "p", "columns": COLUMNS}
    with pytest.raises(ValidationError, match=message):
        CentralsConfig.model_validate({"tables": [{**given, **source}]})


def test_files_that_are_no_tables(tmp_path: Path) -> None:
    for suffix in ("parquet", "csv", "hdf5"):
        with pytest.raises(SimulationError, match="no such file"):
            run(tmp_path / f"none.{suffix}", tmp_path / "out")
        (tmp_path / f"bad.{suffix}").write_bytes(b"\x89\x00")
        with pytest.raises(SimulationError, match="cannot be read as"):
            run(tmp_path / f"bad.{suffix}", tmp_path / "out")
    (tmp_path / "bad.txt").write_text("x")
    with pytest.raises(SimulationError, match="expected a table that ends in"):
        run(tmp_path / "bad.txt", tmp_path / "out")
    write(table(0), tmp_path / "empty.parquet")
    with pytest.raises(SimulationError, match="the table has no rows"):
        run(tmp_path / "empty.parquet", tmp_path / "out")


CSV = 'Mvir,"spin, of Bullock",n\n1e12,0.03,4\n\n2.5e12,"0,04",12\n3e12,0.05,345'


@given(st.integers(30, len(CSV)), st.sampled_from(["\n", "\r\n"]))
def test_a_table_is_read_wherever_it_ends_but_within_a_line(end: int, newline: str) -> None:
    text = CSV[:end]
    last = text.rpartition("\n")[2]
    whole = not last or len(next(csv.reader([last]))) == 3
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "t.csv")
        file.write_bytes(text.replace("\n", newline).encode())
        number = text.count("\n") + 1
        with nullcontext() if whole else pytest.raises(SimulationError, match=f"line {number} has"):
            columns = load_columns(file, ["Mvir"])
            assert len(columns["Mvir"]) == len([line for line in text.splitlines() if line]) - 1


def test_a_row_that_is_longer_than_the_header_moves_no_column(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("M_h,color\n12.5,0.4,\n13.5,0.7,\n")
    with pytest.raises(SimulationError, match=r"line 2 has 3 fields, the header has 2: "):
        load_columns(tmp_path / "t.csv", ["M_h"])


def test_a_halo_must_be_there_once(tmp_path: Path) -> None:
    frame = pandas.concat([table(), table().iloc[[5]]])
    with pytest.raises(SimulationError, match=r"2 rows are equal to another one .* row 5"):
        run(write(frame, tmp_path / "t.parquet"), tmp_path / "out")
    frame["color"] = np.arange(len(frame)) / 1e3  # with another galaxy
    with pytest.raises(SimulationError, match=r"another one in position and log_halo_mass, such as row 5"):
        run(write(frame, tmp_path / "t.parquet"), tmp_path / "out")


def test_neither_or_both_sources(parquet: Path, tmp_path: Path) -> None:
    with pytest.raises(SimulationError, match="got neither"):
        centrals(CentralsConfig(), {}, tmp_path)


@given(c=st.floats(2.2, 500))
def test_concentration_of_an_nfw_halo(c: float) -> None:
    """From the maximum of the circular velocity itself, found by search."""
    radius = np.geomspace(1e-4, 1, 200_000) * c
    v2 = (np.log1p(radius) - radius / (1 + radius)) / radius
    assert nfw_concentration(np.sqrt(v2.max()), np.sqrt(v2[-1])) == pytest.approx(c, rel=1e-3)


def test_concentration_is_that_of_prada_et_al() -> None:
    """Their equations 8 and 9, solved by Brent's method."""
    for ratio in (1.05, 1.2, 1.5, 2.0):

        def excess(c: float, ratio: float = ratio) -> float:
            return np.sqrt(0.216 * c / (np.log1p(c) - c / (1 + c))) - ratio

        assert nfw_concentration(ratio, 1.0) == pytest.approx(brentq(excess, 2.3, 1e3), rel=5e-3)
    assert nfw_concentration(0.9, 1.0) == pytest.approx(2.163, abs=1e-3)


def test_spin_of_a_halo_on_circular_orbits() -> None:
    """All of its mass at the virial radius, on one circle: lambda' = 1 / sqrt(2)."""
    mass, radius = np.array([1e12]), np.array([0.2])
    velocity = np.sqrt(4.30091727e-9 * mass / radius)
    momentum = np.array([[0, 0, 1.0]]) * (velocity * radius)[:, None]
    np.testing.assert_allclose(bullock_spin(momentum, mass, radius), 1 / np.sqrt(2))


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, out = tmp_path_factory.mktemp("camels"), tmp_path_factory.mktemp("catalog")
    write_camels(root, n_simulations=3)
    config = CatalogConfig(path=root, suite="MockA", min_stellar_mass=1e8, split={"test": ["CV_2"]})
    catalog(config, {}, out)
    return out


class TestGroupCatalogues:
    def make(self, tables: Path, out: Path, **config: Any) -> Path:
        centrals(CentralsConfig.model_validate(config), {"catalogs": [tables]}, out)
        return out

    def test_a_row_for_each_halo_with_a_central(self, tables: Path, tmp_path: Path) -> None:
        held = read_centrals(
            [self.make(tables, tmp_path)],
            ["position", "halo", "log_halo_mass", "log_stellar_mass", "log_ssfr", "log_radius", "color_gi"],
            None,
        )
        store = open_catalog(tables / "catalog.zarr")
        for i, name in enumerate(store.names()):
            halos, galaxies = store.table(name, "halos"), store.table(name, "galaxies")
            mine, central = held.simulation == i, galaxies["is_central"]
            assert mine.sum() == central.sum() > 10
            halo = galaxies["halo"][central]
            columns = {key: values[mine] for key, values in held.columns.items()}
            np.testing.assert_array_equal(columns["halo"], halo)
            np.testing.assert_array_equal(columns["position"], halos["position"][halo])
            np.testing.assert_allclose(10 ** columns["log_halo_mass"], halos["mass_200c"][halo])
            np.testing.assert_allclose(10 ** columns["log_stellar_mass"], galaxies["stellar_mass"][central])
            np.testing.assert_allclose(10 ** columns["log_radius"], 3.0, rtol=1e-6)  # kpc/h
            rate = galaxies["star_formation_rate"][central]
            forming = rate > 0
            ssfr = rate[forming] / galaxies["stellar_mass"][central][forming]
            np.testing.assert_allclose(10 ** columns["log_ssfr"][forming], ssfr, rtol=1e-5)

    def test_structure_follows_from_the_fields(self, tables: Path, tmp_path: Path) -> None:
        """`universe` gives subhalos 1.3 times the virial velocity, and the spin parameter 0.05."""
        held = read_centrals([self.make(tables, tmp_path)], ["log_concentration", "spin"], None)
        expected = np.log10(nfw_concentration(1.3, 1.0))
        np.testing.assert_allclose(held.columns["log_concentration"], expected, rtol=1e-4)
        np.testing.assert_allclose(held.columns["spin"], 0.05, rtol=1e-4)

    def test_virial_mass(self, tables: Path, tmp_path: Path) -> None:
        small = read_centrals([self.make(tables, tmp_path / "a")], ["log_halo_mass", "halo"], None)
        large = read_centrals(
            [self.make(tables, tmp_path / "b", halos={"mass": "vir"})], ["log_halo_mass", "halo"], None
        )
        np.testing.assert_allclose(
            large.columns["log_halo_mass"] - small.columns["log_halo_mass"], np.log10(0.9 / 0.8), rtol=1e-4
        )

    def test_splits_of_the_catalogs_are_kept(self, tables: Path, tmp_path: Path) -> None:
        step = self.make(tables, tmp_path, split={"kind": "catalogs"})
        test = read_centrals([step], ["spin"], "test")
        assert {test.simulations[i].name for i in test.simulation} == {"MockA_CV_2"}
        assert len(read_centrals([step], ["spin"], "validation")) == 0

    def test_no_history(self, tables: Path, tmp_path: Path) -> None:
        with pytest.raises(StoreError, match="column 'formation_redshift' is not there"):
            read_centrals([self.make(tables, tmp_path)], ["formation_redshift"], None)

    def test_history_of_a_merger_tree(self, tables: Path, tmp_path: Path) -> None:
        """Halos that are in no tree are left out, and counted."""
        np.savetxt(tmp_path / "redshifts.txt", REDSHIFTS)
        store = open_catalog(tables / "catalog.zarr")
        expected = []
        for name in store.names():
            galaxies = store.table(name, "galaxies")
            n_subhalos = int(galaxies["subhalo"].max()) + 1
            masses = np.random.default_rng(len(expected)).uniform(0.1, 0.5, n_subhalos)
            write_trees(tmp_path / name, [{20: m, 49: 1.0} for m in masses[:-5]])
            low, high = 1 / (1 + REDSHIFTS[20]), 1.0
            subhalo = galaxies["subhalo"][galaxies["is_central"]]
            kept = subhalo[subhalo < n_subhalos - 5]
            expected.append(1 / (low + (0.5 - masses[kept]) / (1 - masses[kept]) * (high - low)) - 1)
        trees = {"path": tmp_path, "snapshot": 49, "redshifts": tmp_path / "redshifts.txt"}
        (tmp_path / "out").mkdir()
        step = self.make(tables, tmp_path / "out", halos={"trees": trees}, split={"kind": "rows"})
        held = read_centrals([step], ["formation_redshift", "spin"], None)
        np.testing.assert_allclose(held.columns["formation_redshift"], np.concatenate(expected), rtol=1e-5)
        facts = open_catalog(step / "catalog.zarr").facts("MockA_CV_0", "centrals")
        assert 0 < facts["halos_without_history"] <= 5

    def test_without_galaxies(self, tmp_path: Path) -> None:
        writer = CatalogWriter(tmp_path / "catalog.zarr")
        attrs = SimulationAttrs(name="Dark", box_size=25.0, redshift=0.0, suite="Dark")
        writer.add(attrs, {"halos": {"mass": np.ones(3)}})
        writer.finish(["Dark"])
        with pytest.raises(SimulationError, match="Dark: there is no table of galaxies"):
            self.make(tmp_path, tmp_path / "out")


@pytest.fixture(scope="module")
def tng300(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Centrals:
    import yaml

    import galdist

    experiment = Path(galdist.__file__).parent / "experiments" / "tng300-halos.yaml"
    step = next(s for s in yaml.safe_load(experiment.read_text())["steps"] if s["stage"] == "centrals")
    config = step["config"]
    config["tables"][0]["file"] = str(shared_data / "tng300_centrals.parquet")
    out = tmp_path_factory.mktemp("tng300")
    centrals(CentralsConfig.model_validate({**config, "seed": 1}), {}, out)
    return read_centrals([out], ["log_stellar_mass", "color_gi", "position", "log_halo_mass"], "test")


class TestRealTables:
    def test_size_and_tracers_of_the_test_split(self, tng300: Centrals) -> None:
        """The published counts of the tracers are of the simulation, the table is an emulation of it."""
        assert len(tng300) == pytest.approx(0.15 * 174_527, abs=8)
        counts = np.bincount(tracer(tng300.columns["log_stellar_mass"], tng300.columns["color_gi"]))
        published = np.array([1497, 1942, 1777, 2300, 482, 11172, 6908])
        shares, expected = counts[1:] / counts.sum(), published / published.sum()
        np.testing.assert_allclose(shares, expected, atol=0.02)

    def test_positions(self, tng300: Centrals) -> None:
        position = tng300.columns["position"]
        assert position.shape == (len(tng300), 3)
        assert position.min() >= 0
        assert position.max() < 205


def test_facts_are_what_json_can_carry(parquet: Path, tmp_path: Path) -> None:
    facts = open_catalog(run(parquet, tmp_path / "out") / "catalog.zarr").facts("Box", "centrals")
    assert json.loads(json.dumps(facts)) == facts
    assert facts["source"] == str(parquet)
    assert facts["split"] == {"kind": "tracers", "validation": 0.15, "test": 0.15, "seed": 3}
