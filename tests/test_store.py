"""The grid store: what is written comes back with its metadata; what is wrong is said."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import xarray
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from galdist.grids.store import (
    Chunking,
    Field,
    FieldStatistics,
    GridStore,
    SimulationAttrs,
    Source,
    StoreError,
    create_store,
    open_store,
)
from hpc import durable

COUNTS = Field(name="matter_counts", assignment="cic")
MOMENTUM = Field(name="matter_momentum", units="Msun/h km/s", assignment="cic", components=3)


def attrs(name: str = "MockA_CV_0", **given: object) -> SimulationAttrs:
    values = {"name": name, "box_size": 25.0, "redshift": 0.0, "suite": "MockA", "set": "CV", **given}
    return SimulationAttrs.model_validate(values)


def new_store(path: Path, n_mesh: int = 16, chunk: int = 8, **given: object) -> GridStore:
    simulations = [attrs(), attrs("MockA_CV_1", split="test")]
    return create_store(path, simulations, [COUNTS, MOMENTUM], n_mesh, Chunking(chunk=chunk, **given))


def test_values_and_metadata_come_back(tmp_path: Path) -> None:
    cosmology = {"Omega_m": 0.3, "sigma_8": 0.8}
    given = attrs(cosmology=cosmology, astrophysics={"A_SN1": 2.0}, seed=7)
    store = create_store(tmp_path / "g.zarr", [given], [COUNTS, MOMENTUM], 16, Chunking(chunk=8))
    values = np.random.default_rng(0).random((16, 16, 16), dtype="f4")
    store["MockA_CV_0"].write("matter_counts", values)
    source = Source(file="snapshot_090.hdf5", size=3, sha256="ab")
    store.write_sources({"MockA_CV_0": [source]})

    grids = open_store(tmp_path / "g.zarr")["MockA_CV_0"]
    assert grids.attrs == given.model_copy(update={"sources": (source,)})
    assert grids.fields == ["matter_counts", "matter_momentum"]
    assert grids.field("matter_momentum") == MOMENTUM
    assert (grids.n_mesh, grids.cell_size) == (16, 25 / 16)
    np.testing.assert_array_equal(grids.read("matter_counts"), values)
    crop = np.s_[3:12, 7:9, 15:16]  # across chunks
    np.testing.assert_array_equal(grids.read("matter_counts", crop), values[crop])
    assert not grids.read("matter_momentum").any(), "what is not written is zero"


@pytest.mark.parametrize("shard", [None, 16])
def test_slabs_written_one_by_one_make_the_field(tmp_path: Path, shard: int | None) -> None:
    store = new_store(tmp_path / "g.zarr", n_mesh=32, chunk=8, shard=shard)
    values = np.random.default_rng(1).normal(size=(3, 32, 32, 32)).astype("f4")
    grids = store["MockA_CV_0"]
    for start in (8, 0, 24, 16):
        for component in range(3):
            grids.write("matter_momentum", values[component, start : start + 8], start, component)
    np.testing.assert_array_equal(open_store(store.path)["MockA_CV_0"].read("matter_momentum"), values)


@pytest.mark.parametrize(("field", "component"), [("matter_counts", None), ("matter_momentum", 1)])
def test_what_is_written_is_flushed_to_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str, component: int | None
) -> None:
    store = new_store(tmp_path / "g.zarr")
    flushed, sync = set(), durable.sync_path
    monkeypatch.setattr(durable, "sync_path", lambda path: (flushed.add(path), sync(path)))
    store["MockA_CV_0"].write(field, np.ones((8, 16, 16), "f4"), 8, component)
    array = tmp_path / "g.zarr" / "MockA_CV_0" / field
    assert flushed == {path for path in (array / "c").rglob("*") if path.is_file()}
    assert len(flushed) >= 4


def test_a_writer_owns_whole_chunks(tmp_path: Path) -> None:
    grids = new_store(tmp_path / "g.zarr")["MockA_CV_0"]
    with pytest.raises(StoreError, match="4:12 are not whole chunks"):
        grids.write("matter_counts", np.zeros((8, 16, 16), "f4"), start=4)
    with pytest.raises(StoreError, match="0:4 are not whole chunks"):
        grids.write("matter_counts", np.zeros((4, 16, 16), "f4"))
    with pytest.raises(StoreError, match=r"values of shape \(8, 8, 16\)"):
        grids.write("matter_counts", np.zeros((8, 8, 16), "f4"))


def test_opens_in_xarray_with_dimensions_coordinates_and_units(tmp_path: Path) -> None:
    new_store(tmp_path / "g.zarr")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dataset = xarray.open_zarr(tmp_path / "g.zarr", group="MockA_CV_0")
    momentum = dataset["matter_momentum"]
    assert momentum.dims == ("component", "z", "y", "x")
    assert momentum.attrs["units"] == "Msun/h km/s"
    assert momentum.attrs["assignment"] == "cic"
    np.testing.assert_allclose(dataset["x"], (np.arange(16) + 0.5) * 25 / 16)
    assert dataset["z"].attrs["units"] == "Mpc/h"
    assert dataset.attrs["box_size"] == 25.0


def test_names_by_split(tmp_path: Path) -> None:
    store = new_store(tmp_path / "g.zarr")
    assert store.names() == list(store) == ["MockA_CV_0", "MockA_CV_1"]
    assert store.names("train") == ["MockA_CV_0"]
    assert store.names("test") == ["MockA_CV_1"]
    assert store.names("validation") == []


def test_statistics_come_last(tmp_path: Path) -> None:
    store = new_store(tmp_path / "g.zarr")
    with pytest.raises(StoreError, match="'statistics' is missing"):
        _ = store.statistics
    given = {"matter_counts": FieldStatistics(mean=1, std=2, max=3, nonzero_fraction=0.5)}
    store.write_statistics(given)
    assert open_store(store.path).statistics == given


def test_attributes_of_a_prediction(tmp_path: Path) -> None:
    store = create_store(
        tmp_path / "p.zarr", [attrs()], [COUNTS], 16, attrs={"checkpoint": "abc", "model": "r2unet"}
    )
    assert open_store(store.path).attrs["checkpoint"] == "abc"


@pytest.mark.parametrize(("key", "value"), [("format", "other"), ("version", 99)])
def test_a_store_of_another_format_does_not_open(tmp_path: Path, key: str, value: object) -> None:
    path = tmp_path / "g.zarr"
    new_store(path)
    zarr.open_group(path, mode="r+").attrs[key] = value
    with pytest.raises(StoreError, match=f"{key} is {value!r}"):
        open_store(path)


def test_no_store_there(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no grid store here"):
        open_store(tmp_path / "nothing.zarr")
    zarr.create_group(tmp_path / "other.zarr")
    with pytest.raises(StoreError, match="format is None"):
        open_store(tmp_path / "other.zarr")


def test_unknown_names_give_the_nearest(tmp_path: Path) -> None:
    store = new_store(tmp_path / "g.zarr")
    with pytest.raises(StoreError, match="did you mean 'MockA_CV_0'"):
        store["MockA_CV_00"]
    with pytest.raises(StoreError, match="did you mean 'matter_counts'"):
        store["MockA_CV_0"].array("mater_counts")


def test_a_group_without_its_box_size_says_so(tmp_path: Path) -> None:
    store = new_store(tmp_path / "g.zarr")
    metadata = tmp_path / "g.zarr" / "zarr.json"
    content = json.loads(metadata.read_text())
    del content["consolidated_metadata"]["metadata"]["MockA_CV_0"]["attributes"]["box_size"]
    metadata.write_text(json.dumps(content))
    with pytest.raises(StoreError, match=r"MockA_CV_0(.|\n)*box_size"):
        open_store(store.path)["MockA_CV_0"]


def test_what_cannot_be_a_store(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="chunk: 6 does not divide n_mesh = 16; choose one of"):
        create_store(tmp_path / "g.zarr", [attrs()], [COUNTS], 16, Chunking(chunk=6))
    with pytest.raises(ValueError, match="multiple of chunk"):
        Chunking(chunk=32, shard=48)
    with pytest.raises(StoreError, match="'MockA_CV_0' is given twice"):
        create_store(tmp_path / "g.zarr", [attrs(), attrs()], [COUNTS], 16)
    with pytest.raises(StoreError, match="at least one field"):
        create_store(tmp_path / "g.zarr", [attrs()], [], 16)
    with pytest.raises(ValueError, match="coordinate"):
        Field(name="x")
    with pytest.raises(ValueError, match="pattern"):
        attrs("../elsewhere")


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_any_crop_equals_the_slice_in_memory(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("crops") / "g.zarr"
    grids = create_store(path, [attrs()], [COUNTS], 16, Chunking(chunk=8))["MockA_CV_0"]
    values = np.random.default_rng(2).poisson(0.3, (16, 16, 16)).astype("f4")
    grids.write("matter_counts", values)
    bounds = [
        sorted(data.draw(st.lists(st.integers(0, 16), min_size=2, max_size=2, unique=True))) for _ in range(3)
    ]
    crop = tuple(slice(a, b) for a, b in bounds)
    np.testing.assert_array_equal(grids.read("matter_counts", crop), values[crop])
