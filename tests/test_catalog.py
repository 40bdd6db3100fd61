"""The catalogue store and the stage that fills it."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import xarray
import zarr
from universe import Truth, write_camels

from galdist.catalogs.catalog import CatalogConfig, CatalogStore, CatalogWriter, catalog, open_catalog
from galdist.grids.store import SimulationAttrs, StoreError
from galdist.simulations.simulation import SimulationError
from hpc import durable

ATTRS = SimulationAttrs(name="MockA_CV_0", box_size=25.0, redshift=0.0, suite="MockA")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[CatalogStore, dict[str, Truth], Path]:
    root = tmp_path_factory.mktemp("camels")
    truths = write_camels(root, n_simulations=3)
    out = tmp_path_factory.mktemp("out")
    config = CatalogConfig(path=root, suite="MockA", min_stellar_mass=1e10, split={"test": ["CV_2"]})
    catalog(config, {}, out)
    return open_catalog(out / "catalog.zarr"), truths, root


def test_tables_are_those_of_the_files(made: tuple[CatalogStore, dict[str, Truth], Path]) -> None:
    store, truths, _ = made
    assert store.names() == list(truths)
    assert store.names("test") == ["MockA_CV_2"]
    for name, truth in truths.items():
        assert store.tables(name) == ["galaxies", "halos", "nbody_halos"]
        halos, galaxies = store.table(name, "halos"), store.table(name, "galaxies")
        keep = truth.stellar_mass >= 1e10
        np.testing.assert_allclose(halos["mass"], truth.halo_mass, rtol=1e-6)
        np.testing.assert_allclose(galaxies["stellar_mass"], truth.stellar_mass[keep], rtol=1e-6)
        expected = [np.sum(truth.galaxy_halo[keep] == halo) for halo in range(len(truth.halo_mass))]
        np.testing.assert_array_equal(halos["n_galaxies"], expected)
        assert halos["n_galaxies"].sum() == len(galaxies["halo"])
        centrals = galaxies["halo"][galaxies["is_central"]]
        assert len(set(centrals)) == len(centrals), "at most one central in a halo"
        assert "n_galaxies" not in store.table(name, "nbody_halos")
        for table in store.tables(name):
            position = store.table(name, table, ["position"])["position"]
            assert ((position >= 0) & (position < 25)).all()


def test_metadata(made: tuple[CatalogStore, dict[str, Truth], Path]) -> None:
    store, _, _ = made
    attrs = store.attrs("MockA_CV_1")
    assert (attrs.box_size, attrs.split, attrs.astrophysics["A_AGN2"]) == (25.0, "train", 4.1)
    assert len(attrs.sources) == 2
    dataset = xarray.open_zarr(store.path, group="MockA_CV_1/galaxies")
    assert dataset["stellar_mass"].attrs["units"] == "Msun/h"
    assert dataset["position"].dims == ("row", "axis")


def test_same_simulations_in_grids_and_catalogs_have_the_same_names(
    made: tuple[CatalogStore, dict[str, Truth], Path], tmp_path: Path
) -> None:
    from galdist.grids.ingest import IngestConfig, ingest
    from galdist.grids.store import open_store

    store, _, root = made
    fields = [{"name": "galaxy_counts"}]
    ingest(IngestConfig(path=root, n_mesh=8, min_stellar_mass=1e10, fields=fields), {}, tmp_path)
    grids = open_store(tmp_path / "grids.zarr")
    assert grids.names() == store.names()
    for name in grids:
        assert grids[name].read("galaxy_counts").sum() == len(store.table(name, "galaxies")["halo"])


def test_an_unfinished_store_does_not_open_and_is_continued(tmp_path: Path) -> None:
    table = {"galaxies": {"position": np.ones((4, 3)), "stellar_mass": np.arange(4.0)}}
    writer = CatalogWriter(tmp_path / "c.zarr")
    writer.add(ATTRS, table)
    with pytest.raises(StoreError, match="not finished"):
        open_catalog(tmp_path / "c.zarr")
    # A simulation whose writing was cut short: tables, but not yet its attributes.
    zarr.open_group(tmp_path / "c.zarr", mode="r+").create_group("MockA_CV_1/galaxies")

    continued = CatalogWriter(tmp_path / "c.zarr")
    assert "MockA_CV_0" in continued
    assert "MockA_CV_1" not in continued
    continued.add(ATTRS.model_copy(update={"name": "MockA_CV_1"}), table)
    store = continued.finish(["MockA_CV_0", "MockA_CV_1"])
    for name in store.names():
        np.testing.assert_array_equal(store.table(name, "galaxies")["stellar_mass"], np.arange(4.0))


def test_empty_tables(tmp_path: Path) -> None:
    writer = CatalogWriter(tmp_path / "c.zarr")
    writer.add(ATTRS, {"galaxies": {"position": np.empty((0, 3), "f4"), "halo": np.empty(0, np.int64)}})
    galaxies = writer.finish(["MockA_CV_0"]).table("MockA_CV_0", "galaxies")
    assert galaxies["position"].shape == (0, 3)
    assert galaxies["halo"].dtype == np.int64


def test_what_is_not_there_is_said(made: tuple[CatalogStore, dict[str, Truth], Path], tmp_path: Path) -> None:
    store, _, root = made
    with pytest.raises(StoreError, match="did you mean 'MockA_CV_0'"):
        store.table("MockA_CV_00", "halos")
    with pytest.raises(StoreError, match=r"table 'halo' is not there; did you mean 'halos'"):
        store.table("MockA_CV_0", "halo")
    with pytest.raises(StoreError, match=r"column 'mass_200m' .*did you mean 'mass_200c'"):
        store.table("MockA_CV_0", "halos", ["mass_200m"])
    with pytest.raises(StoreError, match="no catalogue store here"):
        open_catalog(tmp_path / "nothing.zarr")
    with pytest.raises(StoreError, match="differ in length"):
        CatalogWriter(tmp_path / "c.zarr").add(ATTRS, {"halos": {"mass": np.ones(2), "n": np.ones(3)}})
    with pytest.raises(SimulationError, match="'MockB'; did you mean 'MockA'"):
        catalog(CatalogConfig(path=root, suite="MockB"), {}, tmp_path)


def test_room_is_asked_for_first(
    made: tuple[CatalogStore, dict[str, Truth], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(durable.NotEnoughSpace, match="catalogs of 3 simulations"):
        catalog(CatalogConfig(path=made[2], suite="MockA"), {}, tmp_path / "out")
    assert not (tmp_path / "out").exists()
