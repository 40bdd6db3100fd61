"""The samples store: what is written is read, unfinished and foreign stores say what they are."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

from galdist.catalogs import samples
from galdist.catalogs.centrals import Centrals
from galdist.catalogs.samples import (
    Samples,
    SamplesStore,
    aligned,
    create_samples,
    open_samples,
    rows_per_chunk,
)
from galdist.grids.store import SimulationAttrs, StoreError

TARGETS = ("log_stellar_mass", "color_gi")


def attrs(name: str) -> SimulationAttrs:
    return SimulationAttrs(name=name, box_size=205.0, redshift=0.0, suite="mock", split="test")


def make(path: Path, sizes: dict[str, int] | None = None, **options: Any) -> SamplesStore:
    sizes = {"one": 25, "two": 7} if sizes is None else sizes
    given = {"targets": TARGETS, "n_samples": 3, "label": "SQR", "model": "sqr", **options}
    return create_samples(path / "samples.zarr", [(attrs(name), n) for name, n in sizes.items()], **given)


def content(n: int, seed: int = 0, n_levels: int = 0) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    found = {
        "row": random.permutation(10 * n)[:n],
        "point": random.normal(size=(n, 2)).astype("f4"),
        "samples": random.normal(size=(n, 3, 2)).astype("f4"),
        "extrapolated": random.random(n) < 0.3,
    }
    return found | ({"quantiles": random.normal(size=(n, n_levels, 2)).astype("f4")} if n_levels else {})


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 8 rows."""
    monkeypatch.setattr(samples, "_ROWS", 8)


def fill(store: SamplesStore, skip: tuple[str, int] | None = None) -> dict[str, dict[str, Any]]:
    whole = {}
    for seed, name in enumerate(store.names()):
        whole[name] = content(store.n_rows(name), seed, len(store.levels))
        for start in store.starts(name):
            if (name, start) != skip:
                part = {key: values[start : start + store.chunk] for key, values in whole[name].items()}
                store.write(name, start, **part)
    return whole


@pytest.mark.usefixtures("small_chunks")
def test_what_is_written_is_read(tmp_path: Path) -> None:
    whole = fill(
        make(tmp_path, levels=(0.25, 0.75), checkpoints=["ab"], source_columns={"color_gi": "color"})
    )
    store = open_samples(tmp_path / "samples.zarr")
    assert (store.targets, store.levels, store.n_samples) == (TARGETS, (0.25, 0.75), 3)
    assert (store.label, store.model, store.checkpoints) == ("SQR", "sqr", ("ab",))
    assert store.source_columns == {"color_gi": "color"}
    assert store.names() == ["one", "two"]
    assert store.attrs("two") == attrs("two")
    assert store.chunk == 8
    for number, (name, expected) in enumerate(whole.items()):
        found = store.read(name)
        assert (found.simulation == number).all()
        for key, values in expected.items():
            assert np.array_equal(getattr(found, key), values), key
        assert np.array_equal(store.read(name, slice(2, 6)).samples, expected["samples"][2:6])
        pieces = list(store.chunks(name))
        assert max(map(len, pieces)) <= 8
        assert np.array_equal(np.concatenate([piece.point for piece in pieces]), expected["point"])
    together = store.read()
    assert len(together) == 32
    assert np.array_equal(together.row, np.concatenate([part["row"] for part in whole.values()]))
    assert np.array_equal(together.simulation, np.repeat([0, 1], [25, 7]))
    assert together.quantiles is not None
    assert together.quantiles.shape == (32, 2, 2)


@pytest.mark.usefixtures("small_chunks")
def test_an_interrupted_store_does_not_read_as_zeros(tmp_path: Path) -> None:
    store = make(tmp_path)
    fill(store, skip=("one", 16))
    assert len(store.read("two")) == 7
    assert len(store.read("one", slice(0, 16))) == 16
    with pytest.raises(StoreError, match=r"one: 8 of 25 rows were never written: .* run it again"):
        store.read("one")
    store.write("one", 16, **content(8, 5))
    assert len(open_samples(store.path).read()) == 32


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c | {"start": 4}, "row 4 is not the first of a chunk of 8 rows"),
        (lambda c: c | {"start": 24}, r"point of the rows from 24 has shape \(8, 2\), not \(1, 2\)"),
        (lambda c: c | {"samples": c["samples"][:, :2]}, r"has shape \(8, 2, 2\), not \(8, 3, 2\)"),
        (
            lambda c: c | {"point": np.full((8, 2), np.nan)},
            "point is not a finite number for 8 of the 8 rows",
        ),
        (lambda c: c | {"quantiles": np.zeros((8, 1, 2))}, "created without quantiles"),
        (lambda c: c | {"simulation": "three"}, "simulation 'three' is not there"),
    ],
)
def test_only_whole_finite_chunks_are_written(
    tmp_path: Path, change: Callable[[dict[str, Any]], dict[str, Any]], message: str
) -> None:
    store = make(tmp_path)
    with pytest.raises(StoreError, match=message):
        store.write(**change({"simulation": "one", "start": 0, **content(8)}))
    with pytest.raises(StoreError, match="never written"):
        store.read("one")


def test_quantiles_that_were_promised_are_missed(tmp_path: Path) -> None:
    store = make(tmp_path, {"one": 4}, levels=(0.5,))
    with pytest.raises(StoreError, match=r"quantiles at levels \(0\.5,\) are missing"):
        store.write("one", 0, **content(4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sizes": {}}, "at least one simulation"),
        ({"sizes": {"one": 0}}, "'one' has 0 rows"),
        ({"targets": ()}, "at least one target"),
        ({"targets": ("color_gi", "color_gi")}, "target 'color_gi' is given twice"),
        ({"n_samples": 0}, "0 samples a row"),
        ({"levels": (0.5, 1.0)}, r"levels of quantiles lie in \(0, 1\)"),
    ],
)
def test_what_cannot_be_a_store_is_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(StoreError, match=message):
        make(tmp_path, **options)


def test_other_folders_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no samples store here"):
        open_samples(tmp_path / "nowhere")
    zarr.create_group(tmp_path / "cut.zarr", zarr_format=3)
    with pytest.raises(StoreError, match=r"format is None, .* it was not finished"):
        open_samples(tmp_path / "cut.zarr")
    zarr.create_group(tmp_path / "new.zarr", attributes={"format": samples.FORMAT, "version": 9})
    with pytest.raises(StoreError, match="version is 9, expected 1"):
        open_samples(tmp_path / "new.zarr")


@pytest.mark.parametrize("damage", ["cut", "removed"])
def test_damage_is_told_of(tmp_path: Path, damage: str) -> None:
    store = make(tmp_path, {"one": 1000})
    fill(store)
    chunk = store.path / "one" / "samples" / "c" / "0" / "0" / "0"
    if damage == "cut":
        chunk.write_bytes(chunk.read_bytes()[:100])
        with pytest.raises(StoreError, match="one: damaged"):
            open_samples(store.path).read()
    else:
        chunk.unlink()
        with pytest.raises(StoreError, match="never written"):
            open_samples(store.path).read()


@given(st.integers(1, 10_000), st.integers(1, 30))
def test_chunks_are_bounded(n_samples: int, n_targets: int) -> None:
    rows = rows_per_chunk(n_samples, n_targets)
    assert rows & (rows - 1) == 0
    assert 1 <= rows <= 1 << 17
    assert rows == 1 or rows * n_samples * n_targets <= 1 << 19


def test_rows_have_a_length() -> None:
    assert len(Samples(*(np.zeros(3),) * 5)) == 3  # type: ignore[arg-type]


@pytest.mark.usefixtures("small_chunks")
def test_rows_are_aligned_with_those_of_a_table(tmp_path: Path) -> None:
    store = make(tmp_path, levels=(0.5,))
    whole = fill(store)
    random = np.random.default_rng(0)
    wanted = {name: random.permutation(values["row"])[:5] for name, values in whole.items()}
    order = random.permutation(10)
    centrals = Centrals(
        (attrs("none"), attrs("two"), attrs("one")),
        np.repeat([2, 1], 5)[order],
        np.concatenate([wanted["one"], wanted["two"]])[order],
        {}, {}, {},
    )  # fmt: skip
    found = aligned(store, centrals, slice(2))
    assert found.samples.shape == (10, 2, 2)
    for i, (simulation, row) in enumerate(zip(centrals.simulation, centrals.row, strict=True)):
        name = centrals.simulations[simulation].name
        at = whole[name]["row"].tolist().index(row)
        assert store.names()[found.simulation[i]] == name
        assert found.row[i] == row
        for key in ("point", "extrapolated", "quantiles"):
            assert np.array_equal(getattr(found, key)[i], whole[name][key][at])
        assert np.array_equal(found.samples[i], whole[name]["samples"][at][:2])


def test_halos_that_were_not_predicted(tmp_path: Path) -> None:
    store = make(tmp_path)
    row = fill(store)["one"]["row"]
    table = partial(Centrals, columns={}, units={}, source_columns={})
    with pytest.raises(StoreError, match="1 of the 26 halos of one were not predicted"):
        aligned(store, table((attrs("one"), attrs("two")), np.zeros(26, int), np.append(row, 10**6)))
    three = attrs("one"), attrs("two"), attrs("more")
    with pytest.raises(StoreError, match="2 of the 2 halos of more were not predicted"):
        aligned(store, table(three, np.full(2, 2), np.array([0, 1])))
    with pytest.raises(StoreError, match=r"is of simulation 'two', which the catalogue has not \(one\)"):
        aligned(store, table((attrs("one"),), np.zeros(25, int), row))
