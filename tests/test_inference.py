"""A trained model on somebody's own table: in memory, from file to file, and what is wrong with a table."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pyarrow
import pyarrow.parquet as pq
import pytest
from linear_galaxies import INPUTS, TARGETS, halos, make_centrals, make_model, truth
from scipy import stats
from small_grids import filled, small_disk

import galdist
from galdist import cli, inference
from galdist.catalogs import samples
from galdist.inference import Done, Model, Wanted, parse_columns, parse_wanted, predict_file
from galdist.training.checkpoint import CheckpointError
from galdist.training.sample import Union
from hpc import durable
from hpc.strict import SettingsError

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models ``both``, ``mass``, ``color``, ``without`` quantiles, and ``plain``, which knows no table."""
    folder = tmp_path_factory.mktemp("inference")
    catalogs = make_centrals(folder / "catalogs", {"one": 4000})
    make_model(folder / "both", catalogs)
    make_model(folder / "mass", catalogs, TARGETS[:1])
    make_model(folder / "color", catalogs, TARGETS[1:])
    make_model(folder / "without", catalogs, quantiles=False)
    make_model(folder / "plain", make_centrals(folder / "unnamed", {"one": 4000}, facts={}))
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return galdist.load_model(folder / "both")


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 halos at a time, 50 rows of a file at a time."""
    monkeypatch.setattr(samples, "_ROWS", 64)
    monkeypatch.setattr(inference, "_READ", 50)


def users(n: int = 300, seed: int = 5, **changes: Any) -> pd.DataFrame:
    """A table like the one that the model learned from: other names, masses in linear units."""
    inputs = halos(n, seed)
    return pd.DataFrame(
        {"id": np.arange(n) + 7, "Mvir": 10 ** inputs["log_halo_mass"], "S_h": inputs["spin"]} | changes
    )


def standard(table: pd.DataFrame) -> pd.DataFrame:
    """The same halos under standard names."""
    return pd.DataFrame({"log_halo_mass": np.log10(table["Mvir"]), "spin": table["S_h"]})


def close(one: pd.DataFrame, other: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(one, other, rtol=1e-4, atol=1e-5)


def test_three_lines(folder: Path) -> None:
    table = users(2000)
    model = galdist.load_model(folder / "both")
    draws = model.sample(table, n=20, seed=1)
    assert list(draws) == ["halo", "sample", "smass", "color", "extrapolated"]
    assert np.array_equal(draws["halo"], np.repeat(np.arange(2000), 20))
    assert np.array_equal(draws["sample"], np.tile(np.arange(20), 2000))
    mean = truth(standard(table)).repeat(20, 0)  # type: ignore[arg-type]
    # Properties have the units that the user's table has: masses there are in solar masses.
    found = np.stack([np.log10(draws["smass"] * 1e10), draws["color"]], 1)
    for noise, sigma in zip((found - mean).T, (0.2, 0.3), strict=True):
        assert stats.kstest(noise / sigma, "norm").statistic < 0.03
    assert model.sample(table, n=20, seed=1).equals(draws)
    assert not model.sample(table, n=20, seed=2).equals(draws)


def test_the_draws_of_two_tables_are_independent(model: Model) -> None:
    """Parts of a table, or boxes that are nearly the same, with the same seed."""
    table = users(4000)
    mean = truth(standard(table))[:, 1]  # type: ignore[arg-type]
    nearly = table.assign(S_h=table["S_h"] * (1 + 1e-6))
    noise = [
        model.sample(part, n=1, seed=1)["color"].to_numpy() - expected
        for part, expected in (
            (table[:2000], mean[:2000]),
            (table[2000:].reset_index(drop=True), mean[2000:]),
            (nearly[:2000], mean[:2000]),
        )
    ]
    correlation = np.corrcoef(noise)
    assert np.abs(correlation - np.eye(3)).max() < 0.1


def test_points_and_quantiles(model: Model) -> None:
    table = users()
    points = model.predict(table)
    assert list(points) == ["halo", "smass", "color", "extrapolated"]
    assert len(points) == 300
    assert np.abs(points["color"] - truth(standard(table))[:, 1]).max() < 0.1  # type: ignore[arg-type]
    quantiles = model.quantiles(table, [0.16, 0.5, 0.84])
    assert list(quantiles) == ["halo", "quantile", "smass", "color", "extrapolated"]
    assert np.array_equal(quantiles["quantile"], np.tile([0.16, 0.5, 0.84], 300))
    assert model.quantiles(table, np.array([0.16, 0.5, 0.84])).equals(quantiles)  # type: ignore[arg-type]
    by_level = quantiles["color"].to_numpy().reshape(300, 3)
    assert np.allclose(by_level[:, 1], points["color"], atol=1e-5)
    assert np.allclose(by_level[:, 2] - by_level[:, 1], stats.norm.ppf(0.84) * 0.3, atol=0.02)


def test_standard_names_arrays_and_other_names(model: Model) -> None:
    table = users()
    expected = model.sample(table, 3)
    plain = standard(table)
    close(model.sample(plain, 3), expected)
    arrays = {name: plain[name].to_numpy() for name in INPUTS}
    close(model.sample(arrays, 3), expected)
    # The user's name has the user's units, the standard one standard units.
    renamed = table.rename(columns={"Mvir": "M200"})
    assert model.sample(renamed, 3, columns={"Mvir": "M200"}).equals(expected)
    close(model.sample(renamed, 3, columns={"log_halo_mass": "log10(M200)"}), expected)
    constant = model.predict(table, {"spin": "0.05"})
    assert constant.equals(model.predict(table.assign(S_h=0.05)))
    # So has a number, and a logarithm where the user's column was taken as it is.
    assert model.predict(table, {"S_h": "0.05"}).equals(constant)
    close(model.predict(table, {"Mvir": "1e12"}), model.predict(table.assign(Mvir=1e12)))
    powers = table.assign(S_h=10 ** table["S_h"])
    close(model.sample(powers, 3, columns={"S_h": "log10(S_h)"}), expected)
    with pytest.raises(
        SettingsError, match=r"(?s)Mvir=log10\(M200\): Mvir is no logarithm.*give Mvir=M200, or"
    ):
        model.predict(renamed, {"Mvir": "log10(M200)"})
    with pytest.raises(SettingsError, match=r"Mvir=3 is no halo mass"):
        model.predict(table, {"Mvir": "3"})


def test_a_model_that_knows_no_table_uses_standard_names(folder: Path) -> None:
    model = galdist.load_model(folder / "plain")
    found = model.predict(standard(users()))
    assert list(found) == ["halo", *TARGETS, "extrapolated"]
    with pytest.raises(SettingsError, match=r"column 'log_halo_mass' is missing"):
        model.predict(users())


def test_models_side_by_side(folder: Path) -> None:
    union = galdist.load_model(folder / "mass", folder / "color" / "model")
    assert union.properties == ("smass", "color")
    both = galdist.load_model(folder / "both")
    close(union.predict(users()), both.predict(users()))
    with pytest.raises(CheckpointError, match="models side by side have different targets"):
        galdist.load_model(folder / "mass", folder / "both")


def test_halos_outside_the_training_range_are_marked(model: Model, tmp_path: Path) -> None:
    table = users(200)
    table.loc[[3, 50], "Mvir"] = 1e16
    table.loc[[50, 120], "S_h"] = 0.001
    low, high = model.low, model.high
    x = standard(table).to_numpy(np.float32)
    expected = ((x < low) | (x > high)).any(1)
    assert expected[[3, 50, 120]].all()
    assert np.array_equal(model.predict(table)["extrapolated"], expected)
    table.to_parquet(tmp_path / "halos.parquet")
    done = predict_file(model, tmp_path / "halos.parquet", tmp_path / "out.parquet", Wanted(samples=2))
    assert done.extrapolated == expected.sum()
    assert done.beyond == {
        name: ((x[:, i] < low[i]).sum(), (x[:, i] > high[i]).sum()) for i, name in enumerate(INPUTS)
    }
    assert "spin below in 2" in str(done)
    found = pd.read_parquet(tmp_path / "out.parquet")
    assert np.array_equal(found["extrapolated"], expected.repeat(2))


def write(path: Path, table: pd.DataFrame) -> Path:
    if path.suffix == ".csv":
        table.to_csv(path, index=False)
    elif path.suffix == ".parquet":
        table.to_parquet(path, row_group_size=70)
    else:
        with h5py.File(path, "w") as hdf5:
            for name in table:
                hdf5[f"Group/{name}"] = table[name].to_numpy()
    return path


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("name", ["halos.parquet", "halos.csv", "halos.hdf5"])
def test_a_file_gives_what_memory_gives(model: Model, tmp_path: Path, name: str) -> None:
    table, out = users(), tmp_path / "galaxies.parquet"
    columns = {"Mvir": "Group/Mvir", "S_h": "Group/S_h"} if name.endswith("hdf5") else {}
    seen: list[tuple[int, int | None]] = []
    done = predict_file(
        model,
        write(tmp_path / name, table),
        out,
        Wanted(samples=3, seed=4),
        columns,
        lambda done, total: seen.append((done.halos, total)),
    )
    assert (done.halos, done.rows) == (300, 900)
    total = 300 if name.endswith("parquet") else None
    assert seen == [(halos, total) for halos in (64, 128, 192, 256, 300)]
    assert pd.read_parquet(out).equals(model.sample(table, 3, 4))
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".tmp"] == []
    about = json.loads(pq.read_schema(out).metadata[b"galdist"])
    assert about["seed"] == 4
    assert about["checkpoints"] == list(model.checkpoints)
    assert about["units"]["color"] == "mag"


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("wanted", [Wanted(), Wanted(quantiles=(0.1, 0.9))])
def test_points_and_quantiles_of_a_file(model: Model, tmp_path: Path, wanted: Wanted) -> None:
    predict_file(model, write(tmp_path / "halos.csv", users()), tmp_path / "out.parquet", wanted)
    found = pd.read_parquet(tmp_path / "out.parquet")
    expected = model.quantiles(users(), [0.1, 0.9]) if wanted.quantiles else model.predict(users())
    pd.testing.assert_frame_equal(found, expected)


def test_memory_does_not_grow_with_the_file(model: Model, tmp_path: Path) -> None:
    catalog, held = tmp_path / "halos.parquet", []
    users(600_000).to_parquet(catalog, row_group_size=50_000)
    predict_file(
        model,
        catalog,
        tmp_path / "out.parquet",
        Wanted(),
        tell=lambda *_: held.append(pyarrow.total_allocated_bytes()),
    )
    assert len(held) == 5
    assert max(held) - held[0] < 5e5  # the file has 15 MB


def test_missing_columns_are_named_with_the_nearest(model: Model) -> None:
    with pytest.raises(SettingsError) as caught:
        model.predict(users().rename(columns={"Mvir": "mvir", "S_h": "Spin"}))
    text = str(caught.value)
    assert "column 'Mvir' (or log_halo_mass) is missing: log_halo_mass [log10 Msun/h]" in text
    assert "did you mean 'mvir'?" in text
    assert "column 'S_h' (or spin) is missing" in text
    assert "its columns: id, mvir, Spin; say which is what by NAME=COLUMN" in text
    with pytest.raises(SettingsError, match=r"column 'S_h' .* did you mean 'spins'\?"):
        model.predict(users().rename(columns={"S_h": "spins"}))
    with pytest.raises(SettingsError, match="no input 'log_halomass'; did you mean 'log_halo_mass'"):
        model.predict(users(), {"log_halomass": "Mvir"})
    with pytest.raises(SettingsError, match="column 'M500' is missing"):
        model.predict(users(), {"log_halo_mass": "M500"})
    with pytest.raises(SettingsError, match="all inputs are numbers"):
        model.predict(users(), {"log_halo_mass": "12", "spin": "0.03"})


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_rows_without_numbers_are_named(model: Model, tmp_path: Path, bad: float) -> None:
    table = users()
    table.loc[[100, 111, 112, 113, 114, 115], "S_h"] = bad
    with pytest.raises(
        SettingsError,
        match=r"halos\.parquet: column S_h \(spin\) is not a finite number in 6 of the rows 64 to 127: "
        r"row 100, 111, 112, 113, 114, \.\.\. \(counted from 0\)",
    ):
        predict_file(model, write(tmp_path / "halos.parquet", table), tmp_path / "out.parquet", Wanted())
    assert [path.name for path in tmp_path.iterdir()] == ["halos.parquet"]


def test_missing_values_of_parquet_are_no_numbers(model: Model, tmp_path: Path) -> None:
    table = users().assign(S_h=pd.array([None, *[0.05] * 299], dtype="Float64"))
    with pytest.raises(SettingsError, match=r"column S_h .* row 0 "):
        predict_file(model, write(tmp_path / "halos.parquet", table), tmp_path / "out.parquet", Wanted())


def test_wrong_units_are_told_and_mended(model: Model) -> None:
    linear = standard(users()).assign(log_halo_mass=10 ** standard(users())["log_halo_mass"])
    with pytest.raises(
        SettingsError,
        match=r"column log_halo_mass holds values like \S*e\+11, which are no halo mass in log10 Msun/h: "
        r"expected 7 to 17 \(training: 11\.\S* to \S*\)\. It is not a logarithm: give --columns "
        r"'log_halo_mass=log10\(log_halo_mass\)'",
    ):
        model.predict(linear)
    mended = model.predict(linear, {"log_halo_mass": "log10(log_halo_mass)"})
    close(mended, model.predict(users()))
    with pytest.raises(SettingsError, match=r"column Mvir: 300 of 300 values are negative"):
        model.predict(users(Mvir=-1.0))
    with pytest.raises(
        SettingsError, match=r"column S_h \(spin\) holds values like 500, .* expected 0 to \d+"
    ):
        model.predict(users(S_h=500.0))
    for given, message in (
        ("nan", "spin=nan is no finite number"),
        ("inf", "spin=inf is no finite number"),
        ("500", "spin=500 is no spin parameter: expected 0 to 20"),
    ):
        with pytest.raises(SettingsError, match=message):
            model.predict(users(), {"spin": given})
    with pytest.raises(
        SettingsError, match=r"log_halo_mass=1e12 is no halo mass .* logarithm: give its log10"
    ):
        model.predict(users(), {"log_halo_mass": "1e12"})
    assert model.predict(users().assign(S_h=[500.0, *[0.05] * 299]))["extrapolated"][0]  # one: odd, not wrong


def test_free_columns_are_compared_with_the_training_range(folder: Path, tmp_path: Path) -> None:
    """A parameter of the simulation was the same for all rows: nothing is known of its range."""
    step = make_model(tmp_path / "model", folder / "catalogs", inputs=(*INPUTS, "Omega_m"))
    model = galdist.load_model(step)
    found = model.predict(users(), {"Omega_m": "0.25"})
    assert found["extrapolated"].all()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.parquet", None, "no such file"),
        ("bad.parquet", b"words", "cannot be read as parquet"),
        ("bad.hdf5", b"words", "cannot be read as hdf5"),
        ("empty.csv", b"", "cannot be read as csv"),
        ("halos.fits", b"words", r"expected a table that ends in \.parquet, \.csv, \.hdf5, \.h5"),
        ("rowless.csv", b"Mvir,S_h\n", "the table has no rows"),
        ("words.csv", b"Mvir,S_h\n1e12,much\n", "column S_h does not hold numbers"),
    ],
)
def test_what_is_no_table(
    model: Model, tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(SettingsError, match=message):
        predict_file(model, tmp_path / name, tmp_path / "out.parquet", Wanted())
    assert not (tmp_path / "out.parquet").exists()


@pytest.mark.parametrize("end", ["", "\n"])
def test_a_table_that_is_cut_off_in_its_last_line(model: Model, tmp_path: Path, end: str) -> None:
    """Also behind all that the model reads."""
    catalog, out = tmp_path / "halos.csv", tmp_path / "out.parquet"
    whole = users().assign(V=np.arange(300), W=0.5).drop(columns="id").to_csv(index=False).rstrip()
    catalog.write_text(whole.rpartition(",")[0] + end)
    with pytest.raises(
        SettingsError, match=r"halos\.csv: cannot be read as csv: line 301 has 3 fields, .* 4"
    ):
        predict_file(model, catalog, out, Wanted())
    assert not out.exists()
    catalog.write_text(whole + end)
    predict_file(model, catalog, out, Wanted())
    assert pd.read_parquet(out).equals(model.predict(users()))


def damaged(path: Path, table: pd.DataFrame) -> Path:
    """A table that opens, and breaks in the middle."""
    if path.suffix == ".csv":
        lines = table.to_csv(index=False).encode().splitlines(keepends=True)
        path.write_bytes(b"".join([*lines[:200], b"\xff,\xff,\xff\n", *lines[200:]]))
        return path
    pq.write_table(pyarrow.Table.from_pandas(table), path, row_group_size=70)
    column = pq.read_metadata(path).row_group(2).column(1)
    content = bytearray(path.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    content[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(content)
    return path


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_a_table_that_breaks_in_the_middle(model: Model, tmp_path: Path, suffix: str) -> None:
    catalog = damaged(tmp_path / f"halos.{suffix}", users())
    with pytest.raises(SettingsError, match=rf"halos\.{suffix}: cannot be read as {suffix}: "):
        predict_file(model, catalog, tmp_path / "out.parquet", Wanted())
    assert list(tmp_path.iterdir()) == [catalog]


def test_the_ends_of_paths_are_names_where_they_are_unique(model: Model, tmp_path: Path) -> None:
    table = users()
    with h5py.File(tmp_path / "halos.hdf5", "w") as hdf5:
        hdf5["Box/Halos/Mvir"] = hdf5["Box/Galaxies/Mass"] = table["Mvir"].to_numpy()
        hdf5["Box/Halos/S_h"] = table["S_h"].to_numpy()
        hdf5["Box/Halos/Mass"] = np.zeros(300)
    out = tmp_path / "out.parquet"
    predict_file(model, tmp_path / "halos.hdf5", out, Wanted())
    assert pd.read_parquet(out).equals(model.predict(table))
    predict_file(
        model, tmp_path / "halos.hdf5", out, Wanted(), {"Mvir": "Galaxies/Mass", "spin": "Halos/S_h"}
    )
    assert pd.read_parquet(out).equals(model.predict(table))
    with pytest.raises(SettingsError, match=r"column 'Mass' .* is missing"):
        predict_file(model, tmp_path / "halos.hdf5", out, Wanted(), {"Mvir": "Mass"})


def test_lengths_differ(model: Model, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="columns differ in length"):
        model.predict({"Mvir": np.ones(3), "S_h": np.ones(2)})
    with h5py.File(tmp_path / "halos.h5", "w") as hdf5:
        hdf5["Mvir"], hdf5["S_h"] = np.ones(3), np.ones(2)
    with pytest.raises(SettingsError, match="columns differ in length"):
        predict_file(model, tmp_path / "halos.h5", tmp_path / "out.parquet", Wanted())


def test_the_result_is_no_table_of_the_user(model: Model, tmp_path: Path) -> None:
    catalog = write(tmp_path / "halos.parquet", users())
    with pytest.raises(SettingsError, match="would replace the table"):
        predict_file(model, catalog, catalog, Wanted())
    with pytest.raises(SettingsError, match=r"ends in \.parquet"):
        predict_file(model, catalog, tmp_path / "out.csv", Wanted())
    with pytest.raises(SettingsError, match="is a folder: name the file"):
        predict_file(model, catalog, tmp_path, Wanted())
    (tmp_path / "file").touch()
    for nowhere in (tmp_path / "file" / "out.parquet", Path("/proc/none/out.parquet")):
        with pytest.raises(SettingsError, match=r"nothing can be written to .* name a file elsewhere"):
            predict_file(model, catalog, nowhere, Wanted())


def test_a_property_called_like_a_column_of_ours_keeps_its_standard_name(tmp_path: Path) -> None:
    source = {"log_stellar_mass": {"column": "sample"}, "color_gi": {"column": "color"}}
    catalogs = make_centrals(tmp_path / "catalogs", {"one": 500}, facts={"columns": source})
    model = galdist.load_model(make_model(tmp_path / "model", catalogs))
    assert list(model.sample(standard(users()))) == [
        "halo",
        "sample",
        "log_stellar_mass",
        "color",
        "extrapolated",
    ]


def test_a_full_disk_is_told_of(model: Model, tmp_path: Path) -> None:
    catalog = write(tmp_path / "halos.csv", users(20_000))
    with small_disk(tmp_path / "disk", 2 << 20) as disk:
        out = disk / "out.parquet"
        with pytest.raises(durable.NotEnoughSpace, match=r"no room for out\.parquet in .*: No space left"):
            predict_file(model, catalog, out, Wanted(samples=50))
        assert list(disk.iterdir()) == []
        parquet = write(tmp_path / "halos.parquet", users(20_000))
        with pytest.raises(durable.NotEnoughSpace, match=r"out\.parquet \(20000 halos\) needs 0\.01 GB"):
            predict_file(model, parquet, out, Wanted(samples=50))
        predict_file(model, parquet, out, Wanted())
        with filled(disk), pytest.raises(durable.NotEnoughSpace):
            predict_file(model, catalog, out, Wanted())
        assert pq.read_metadata(out).num_rows == 20_000  # the earlier one


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """``run(*words)``: exit status, output and errors of ``galdist predict *words``, in this process."""
    handler = signal.getsignal(signal.SIGTERM)

    def start(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["galdist", "predict", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0), *capsys.readouterr()

    yield start
    signal.signal(signal.SIGTERM, handler)


def test_the_command(folder: Path, tmp_path: Path, run: Run) -> None:
    table = users(300)
    table.loc[7, "S_h"] = 0.9
    catalog, out = write(tmp_path / "halos.csv", table), tmp_path / "galaxies.parquet"
    status, said, told = run(
        folder / "mass", folder / "color", catalog, "--samples", 2, "--out", out, "--seed", 3
    )
    assert (status, said) == (0, f"{out}: 600 rows\n")
    assert "spin above in 1" in told
    expected = galdist.load_model(folder / "mass", folder / "color").sample(table, 2, 3)
    pd.testing.assert_frame_equal(pd.read_parquet(out), expected)
    status, _, told = run(folder / "nothing", catalog, "--out", out)
    assert status == 2
    assert "no trained model here" in told
    status, _, told = run(folder / "both", catalog, "--out", out, "--columns", "spin=S")
    assert status == 2
    assert "column 'S' is missing: spin is an input of the model" in told
    status, _, told = run(folder / "without", tmp_path / "none.csv", "--out", out, "--quantiles", ".1,.9")
    assert status == 2
    assert "--quantiles: linear has no quantiles of its own at 0.1, 0.9: ask for samples" in told
    assert pq.read_metadata(out).num_rows == 600


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_stopping_leaves_no_half_file(
    folder: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, signum: signal.Signals
) -> None:
    catalog, place, draw = write(tmp_path / "halos.parquet", users()), tmp_path / "out", Union.sample

    def stopped_in_the_third_piece(union: Union, inputs: Any, n: int, seed: int, chunk: int) -> Any:
        if chunk == 2:
            assert [path.suffix for path in place.iterdir()] == [".tmp"]
            os.kill(os.getpid(), signum)
            time.sleep(10)
        return draw(union, inputs, n, seed, chunk)

    monkeypatch.setattr(Union, "sample", stopped_in_the_third_piece)
    out = place / "galaxies.parquet"
    status, _, told = run(folder / "both", catalog, "--out", out)
    assert (status, told) == (130, f"galdist: stopped: {out} was not written\n")
    assert list(place.iterdir()) == []


def test_what_the_command_line_asks_for() -> None:
    assert parse_wanted(None, False, None, 3) == Wanted(samples=1, seed=3)
    assert parse_wanted(7, False, None, 0) == Wanted(samples=7)
    assert parse_wanted(None, True, None, 0) == Wanted()
    assert parse_wanted(None, False, ".05,.5", 0) == Wanted(quantiles=(0.05, 0.5))
    with pytest.raises(SettingsError, match="--samples, --point: one of them at a time"):
        parse_wanted(5, True, None, 0)
    for levels in (".5,two", "5,50,95", ""):
        with pytest.raises(SettingsError, match=r"--quantiles: expected numbers between 0 and 1"):
            parse_wanted(None, False, levels, 0)
    assert parse_columns(["a=b", "c=log10(d)"]) == {"a": "b", "c": "log10(d)"}
    with pytest.raises(SettingsError, match=r"(?s)expected NAME=COLUMN.*a is given twice"):
        parse_columns(["x", "a=b", "a=c"])
    with pytest.raises(ValueError, match="n is the number of samples"):
        Model.sample(None, None, 0)  # type: ignore[arg-type]
    for wrong in ({"seed": -1}, {"samples": 2.0}):
        with pytest.raises(ValueError, match=r"is a whole number from 0 on, got (-1|2\.0)"):
            Wanted(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no level"):
        Model.quantiles(None, None, [])  # type: ignore[arg-type]


def test_a_disk_that_is_full_ends_the_command(
    monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path, run: Run
) -> None:
    def full(*_: object) -> Done:
        raise durable.NotEnoughSpace("no room for galaxies")

    monkeypatch.setattr(inference, "predict_file", full)
    status, _, told = run(folder / "both", "halos.csv", "--out", tmp_path / "galaxies.parquet")
    assert (status, told) == (1, "galdist: no room for galaxies\n")
