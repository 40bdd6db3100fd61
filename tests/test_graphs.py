"""The graph network: who are neighbors, what they tell of a galaxy, and models that look at them in use."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from small_tables import make_tables

import galdist
from galdist.catalogs.catalog import CatalogWriter
from galdist.catalogs.centrals import read_centrals
from galdist.catalogs.neighbors import Halos, Neighborhood
from galdist.catalogs.samples import open_samples
from galdist.data.tables import Surroundings, TableData
from galdist.grids.store import SimulationAttrs, StoreError
from galdist.inference import Model, Wanted, predict_file
from galdist.training.sample import SampleConfig, sample
from galdist.training.train import TrainConfig, train
from hpc import ddp
from hpc.strict import SettingsError

ALONE = ddp.Group(0, 1, 0, torch.device("cpu"))
BOX = 60.0
SIGMA = 0.2
"""Scatter of the galaxies' masses in `pairs`."""
SPREAD = 0.5
"""Standard deviation of the halo masses there."""
SMALL: dict[str, Any] = {"width": 16, "blocks": 1, "bins": 4, "message": 16, "embedding": 4}


def pairs(step: Path, n: int, box: float = BOX, facts: dict[str, Any] | None = None) -> Path:
    """A step with ``n`` halos in pairs, each galaxy as massive as the partner's halo but for a scatter.

    Pairs lie on a grid of 4 Mpc/h, their halos 0.5 Mpc/h apart: across the faces of the box too.
    """
    random = np.random.default_rng(0)
    side = int(box / 4)
    cells = random.permutation(side**3)[: n // 2]
    center = 4.0 * np.stack(np.unravel_index(cells, (side,) * 3), 1) + random.uniform(-0.5, 0.5, (n // 2, 3))
    axis = random.normal(size=(n // 2, 3))
    axis *= 0.25 / np.linalg.norm(axis, axis=1)[:, None]
    position = np.concatenate([center + axis, center - axis]) % box
    mass = random.normal(12, SPREAD, n)
    columns = {
        "log_halo_mass": mass,
        "log_stellar_mass": np.roll(mass, n // 2) - 2 + SIGMA * random.normal(size=n),
        "position": position,
        "split": random.choice(3, n, p=[0.6, 0.2, 0.2]).astype(np.int8),
    }
    writer = CatalogWriter(step / "catalog.zarr")
    attrs = SimulationAttrs(name="box", box_size=box, redshift=0.0, suite="pairs")
    about = {
        "columns": {"log_halo_mass": {"column": "M", "log10": True}},
        "position": {"columns": ["X", "Y", "Z"], "scale": 1e-3},
    }
    writer.add(attrs, {"centrals": columns}, facts={"centrals": about if facts is None else facts})
    writer.finish(["box"])
    return step


def training(name: str, linking_length: float = 1.0) -> TrainConfig:
    model = {"name": name, "inputs": ["log_halo_mass"], "targets": ["log_stellar_mass"]}
    small = {key: value for key, value in SMALL.items() if name == "graph-sqr" or key in ("width", "blocks")}
    if name == "graph-sqr":
        small["neighbors"] = {"linking_length": linking_length, "most": 4}
    return TrainConfig.model_validate(
        {
            "model": model | small,
            "epochs": 20,
            "batch_size": 128,
            "optimizer": {"learning_rate": 1e-2},
            "schedule": {"kind": "cosine"},
            "ema_decay": 0.9,
        }
    )


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`pairs`, and what was learned of them with and without neighbors."""
    folder = tmp_path_factory.mktemp("graphs")
    made = {"centrals": pairs(folder / "centrals", 4000)}
    for name in ("graph-sqr", "autoregressive-sqr"):
        made[name] = folder / name
        train(training(name), {"catalogs": [made["centrals"]]}, made[name])
    return made


def score(draws: NDArray[Any], truth: NDArray[Any]) -> float:
    """Mean continuous ranked probability score of draws (n, m), by its definition."""
    spread = np.abs(draws[:, :, None] - draws[:, None]).mean((1, 2)) * draws.shape[1] / (draws.shape[1] - 1)
    return float((np.abs(draws - truth[:, None]).mean(1) - spread / 2).mean())


def test_what_neighbors_decide_is_learned_and_nobody_else_can_know_it(
    steps: dict[str, Path], tmp_path: Path
) -> None:
    """The score of a Gaussian about its mean is sigma / sqrt(pi): of the scatter alone for who knows the
    partner, of scatter and halo masses together for who does not."""
    scores = {}
    for name in ("graph-sqr", "autoregressive-sqr"):
        inputs = {"catalogs": [steps["centrals"]], "models": [steps[name]]}
        sample(SampleConfig(samples=40), inputs, tmp_path / name)
        found = open_samples(tmp_path / name / "samples.zarr").read()
        truth = read_centrals([steps["centrals"]], ["log_stellar_mass"], "test").columns["log_stellar_mass"]
        scores[name] = score(found.samples[..., 0], truth)
        assert not found.extrapolated.mean() > 0.05
    best, blind = SIGMA / np.sqrt(np.pi), np.hypot(SIGMA, SPREAD) / np.sqrt(np.pi)
    assert best * 0.9 < scores["graph-sqr"] < best * 1.25
    assert scores["autoregressive-sqr"] == pytest.approx(blind, rel=0.1)


@settings(deadline=None, max_examples=40)
@given(
    n=st.integers(1, 60),
    length=st.floats(0.1, 5),
    most=st.integers(1, 70),
    grid=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_neighbors_are_all_within_the_linking_length(
    n: int, length: float, most: int, grid: bool, seed: int
) -> None:
    """Against all pairs of a periodic box; on a grid many halos lie at one place."""
    random = np.random.default_rng(seed)
    position = random.integers(0, 4, (n, 3)) * 2.5 if grid else random.uniform(0, 10, (n, 3))
    rows = random.permutation(n)[: n // 2 + 1]
    halos = Halos(np.zeros((n, 1), np.float32), position, 10.0)
    found = halos.neighbors(rows, Neighborhood(linking_length=length, most=most))
    apart = np.abs(position[rows][:, None] - position)
    distance = np.linalg.norm(np.minimum(apart, 10 - apart), axis=-1)
    ends = np.cumsum(found.count)
    for i, row in enumerate(rows):
        here = slice(ends[i] - found.count[i], ends[i])
        others = np.delete(distance[i], row)
        expected = np.sort(others[others <= length])[:most]
        np.testing.assert_allclose(found.distance[here], expected, atol=1e-6)
        np.testing.assert_allclose(distance[i][found.row[here]], expected, atol=1e-6)
        assert row not in found.row[here]
        assert len(set(found.row[here])) == found.count[i]
    assert halos.density == pytest.approx(n / 1000)


@settings(deadline=None, max_examples=20)
@given(rows=st.lists(st.integers(0, 39), max_size=60))
def test_a_batch_has_the_neighbors_of_its_rows(rows: list[int]) -> None:
    """Rows in any order, some of them twice."""
    random = np.random.default_rng(3)
    inputs = random.normal(size=(40, 2)).astype(np.float32)
    halos = Halos(inputs, random.uniform(0, 10, (40, 3)), 10.0)
    of = Neighborhood(linking_length=3.0)
    batch = Surroundings(
        torch.from_numpy(inputs), halos.neighbors(np.arange(40), of), torch.device("cpu")
    ).of(torch.tensor(rows, dtype=torch.int64))
    alone = [halos.neighbors(np.array([row]), of) for row in rows]
    counts = [len(each.row) for each in alone]
    assert batch["receiver"].tolist() == np.repeat(np.arange(len(rows)), counts).tolist()
    empty = np.empty(0, np.int64)
    assert np.array_equal(batch["neighbors"], inputs[np.concatenate([empty, *(each.row for each in alone)])])
    assert np.array_equal(batch["distance"], np.concatenate([empty, *(each.distance for each in alone)]))


def test_neighbors_are_of_the_same_simulation_and_of_all_splits(tmp_path: Path) -> None:
    make_tables(tmp_path, (300, 200))
    names = ("log_halo_mass", "spin")
    of = Neighborhood(linking_length=4.0, most=1000)
    data = TableData([tmp_path], names, ("color_gi",), of)
    everyone = read_centrals([tmp_path], [*names, "position"], None)
    validation = read_centrals([tmp_path], names, "validation")
    (batch,) = (each for each in data.validation_batches(ALONE) if each is not None)
    expected = []
    for box, row in zip(validation.simulation, validation.row, strict=True):
        same = everyone.simulation == box
        apart = np.abs(
            everyone.columns["position"][same].astype("f8") - everyone.columns["position"][same][row]
        )
        near = (np.linalg.norm(np.minimum(apart, 25 - apart), axis=1) <= 4) & (np.arange(same.sum()) != row)
        expected.append(sorted(everyone.columns["log_halo_mass"][same][near]))
    receiver = batch["receiver"].numpy()
    for i, masses in enumerate(expected):
        assert np.allclose(sorted(batch["neighbors"][receiver == i, 0].tolist()), masses)
    assert "neighbors" not in next(
        iter(TableData([tmp_path], names, ("color_gi",)).validation_batches(ALONE))
    )


def users(steps: dict[str, Path]) -> pd.DataFrame:
    """The table that the models learned from, as its owner has it: kpc/h, solar masses."""
    rows = read_centrals([steps["centrals"]], ["log_halo_mass", "position"], None).columns
    places = dict(zip("XYZ", 1e3 * rows["position"].T, strict=True))
    return pd.DataFrame({"M": 10 ** rows["log_halo_mass"], **places})


def test_a_users_table(steps: dict[str, Path], tmp_path: Path) -> None:
    model, table = galdist.load_model(steps["graph-sqr"]), users(steps)
    about = yaml.safe_load((steps["graph-sqr"] / "model" / "model.yaml").read_text())
    assert about["halo_density"] == pytest.approx([4000 / BOX**3] * 2)
    assert about["columns"]["x"] == {
        "role": "position",
        "units": "Mpc/h",
        "source": {"column": "X", "scale": 1e-3},
    }
    box = {"box_size": "60"}
    points = model.predict(table, columns=box)
    truth = read_centrals([steps["centrals"]], ["log_stellar_mass"], None).columns["log_stellar_mass"]
    assert np.std(points["log_stellar_mass"] - truth) == pytest.approx(SIGMA, rel=0.2)
    # In any units and names, and turned and moved as a periodic box may be.
    turned = {axis: (table[other] * 1e-3 + 17.0) % BOX for axis, other in zip("xyz", "ZXY", strict=True)}
    plain = {"log_halo_mass": np.log10(table["M"]), **turned}
    moved = model.predict(plain, columns=box)
    assert np.allclose(moved["log_stellar_mass"], points["log_stellar_mass"], atol=2e-3)
    vector = {"log_halo_mass": plain["log_halo_mass"], "position": np.stack(list(turned.values()), 1)}
    assert np.allclose(model.predict(vector, columns=box)["log_stellar_mass"], moved["log_stellar_mass"])
    # From file to file, and by the stage, the draws are the same.
    table.to_parquet(tmp_path / "halos.parquet", row_group_size=700)
    predict_file(model, tmp_path / "halos.parquet", tmp_path / "out.parquet", Wanted(samples=3, seed=2), box)
    drawn = pd.read_parquet(tmp_path / "out.parquet")
    pd.testing.assert_frame_equal(drawn, model.sample(table, 3, 2, columns=box))
    inputs = {"catalogs": [steps["centrals"]], "models": [steps["graph-sqr"]]}
    sample(SampleConfig(samples=3, seed=2, split="all"), inputs, tmp_path / "sampled")
    found = open_samples(tmp_path / "sampled" / "samples.zarr").read()
    assert np.allclose(found.samples.ravel(), drawn["log_stellar_mass"], atol=2e-3)
    quantiles = model.quantiles(table[:200], [0.1, 0.9], columns=box)
    assert np.all(np.diff(quantiles["log_stellar_mass"].to_numpy().reshape(-1, 2)) > 0)


def test_halos_that_are_sparser_than_those_learned_from_are_marked(steps: dict[str, Path]) -> None:
    model, table, box = galdist.load_model(steps["graph-sqr"]), users(steps), {"box_size": "60"}
    within = model.predict(table, columns=box)["extrapolated"]
    assert within.mean() < 0.01
    thin = model.predict(table[::2], columns=box)
    assert thin["extrapolated"].all()
    assert model.predict(table[:1], columns=box).notna().all(axis=None)  # all alone


@pytest.mark.parametrize(
    ("dropped", "columns", "message"),
    [
        ([], {}, r"periodic box too: tell its side in Mpc/h as a number, such as box_size=205; got none"),
        ([], {"box_size": "wide"}, "got wide"),
        ([], {"box_size": "50"}, r"rows are outside the box \[0, 50\] Mpc/h"),
        ([], {"box_size": "1.5", **dict.fromkeys("XYZ", "small")}, "linking length of 1 Mpc/h does not fit"),
        (["Y"], {"box_size": "60"}, r"column 'Y' \(or y\) is missing: y \[Mpc/h\] places halos among"),
    ],
)
def test_what_a_graph_needs_is_asked_for(
    steps: dict[str, Path], dropped: list[str], columns: dict[str, str], message: str
) -> None:
    model: Model = galdist.load_model(steps["graph-sqr"])
    table = users(steps).drop(columns=dropped)
    table["small"] = np.linspace(0, 1400, len(table))  # kpc/h, as in the table of the training
    with pytest.raises(SettingsError, match=message):
        model.predict(table, columns=columns)


def test_tables_without_positions_and_boxes_that_are_too_small_are_refused(
    steps: dict[str, Path], tmp_path: Path
) -> None:
    writer = CatalogWriter(tmp_path / "dark" / "catalog.zarr")
    attrs = SimulationAttrs(name="box", box_size=BOX, redshift=0.0, suite="pairs")
    mass = np.linspace(11, 13, 90)
    split = (np.arange(90) % 3).astype(np.int8)
    writer.add(attrs, {"centrals": {"log_halo_mass": mass, "log_stellar_mass": mass - 2, "split": split}})
    writer.finish(["box"])
    with pytest.raises(StoreError, match="column 'position' is not there"):
        train(training("graph-sqr"), {"catalogs": [tmp_path / "dark"]}, tmp_path / "out")
    inputs = {"catalogs": [tmp_path / "dark"], "models": [steps["graph-sqr"]]}
    with pytest.raises(StoreError, match="column 'position' is not there"):
        sample(SampleConfig(), inputs, tmp_path / "drawn")
    assert not (tmp_path / "drawn" / "samples.zarr").exists()
    with pytest.raises(ValueError, match="linking length of 40 Mpc/h does not fit into a box of 60 Mpc/h"):
        train(training("graph-sqr", 40.0), {"catalogs": [steps["centrals"]]}, tmp_path / "wide")
