"""The report's tables of predictions: confusions, and metrics by where models were trained and tested."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import yaml

from galdist.catalogs.catalog import CatalogWriter
from galdist.grids.store import Field, GridStore, SimulationAttrs, create_store
from galdist.report.artist import Artist
from galdist.report.domains import Domains, implied_balance
from galdist.report.plots import Palette
from galdist.report.published import PUBLISHED
from galdist.report.tables import Table
from galdist.run import open_run
from galdist.statistics import fields, spectra
from galdist.statistics.metrics import Confusion, metric_row, save_metrics
from galdist.status import PLAN
from hpc import durable

NEAR, FAR = Confusion(8, 2, 88, 2), Confusion(5, 15, 75, 5)


def attrs(name: str, suite: str, redshift: float = 0.0) -> SimulationAttrs:
    return SimulationAttrs(name=name, box_size=25.0, redshift=redshift, suite=suite, set="CV", split="test")


BOXES = {
    "near": [attrs("A_CV_0", "A"), attrs("A_CV_1", "A")],
    "far": [attrs("B_CV_0", "B")],
    "early": [attrs("A_CV_0", "A", 0.5), attrs("A_CV_1", "A", 0.5)],
}
STEPS = [
    *({"name": name, "stage": "ingest"} for name in BOXES),
    {"name": "near-galaxies", "stage": "catalog"},
    {"name": "classifier", "stage": "train", "inputs": {"grids": ["near"]}},
    {"name": "regressor", "stage": "train", "inputs": {"grids": ["near"], "models": ["classifier"]}},
    {"name": "net", "stage": "predict", "inputs": {"grids": ["near", "far"], "model": ["regressor"]}},
    {"name": "net-early", "stage": "predict", "inputs": {"grids": "early", "model": "regressor"}},
    {"name": "hod", "stage": "hod", "inputs": {"grids": ["far"], "catalogs": ["near-galaxies"]}},
    {"name": "spectra", "stage": "spectra", "inputs": {"grids": ["near", "far"], "predictions": ["net"]}},
    {"name": "others", "stage": "field-statistics", "inputs": {"grids": ["far"], "predictions": ["hod"]}},
]


def store(path: Path, boxes: list[SimulationAttrs]) -> GridStore:
    return create_store(path, boxes, [Field(name="galaxy_counts")], 8)


@pytest.fixture
def tables(tmp_path: Path) -> Mapping[str, Table]:
    steps = [{"config": {}, **step} for step in STEPS]
    durable.write_text(tmp_path / "run.yaml", yaml.safe_dump({"name": "tiny", "steps": steps}))
    durable.write_json(tmp_path / PLAN, {step["name"]: "" for step in steps})
    models = {"classifier": {"name": "some-classifier"}, "regressor": {"name": "some-regressor"}}
    for step in steps:
        (tmp_path / str(step["name"])).mkdir()
        config = {"model": models.get(str(step["name"]))}
        durable.write_text(tmp_path / str(step["name"]) / "config.yaml", yaml.safe_dump(config))
    stores = {name: store(tmp_path / name / "grids.zarr", boxes) for name, boxes in BOXES.items()}
    predictions = {
        "net": store(tmp_path / "net" / "prediction.zarr", [*BOXES["near"], *BOXES["far"]]),
        "net-early": store(tmp_path / "net-early" / "prediction.zarr", BOXES["early"]),
        "hod": store(tmp_path / "hod" / "prediction.zarr", BOXES["far"]),
    }
    # Of all boxes together they mix what is compared here.
    save_metrics(
        tmp_path / "net",
        [*NEAR.rows("A_CV_0"), *NEAR.rows("A_CV_1"), *FAR.rows("B_CV_0"), *(NEAR + NEAR + FAR).rows("all")],
    )
    save_metrics(tmp_path / "net-early", [*FAR.rows("A_CV_0"), *FAR.rows("A_CV_1")])
    writer = CatalogWriter(tmp_path / "near-galaxies" / "catalog.zarr")
    for box in BOXES["near"]:
        writer.add(box, {"halos": {"mass": np.array([1e12])}})
    writer.finish([box.name for box in BOXES["near"]])
    durable.write_json(tmp_path / "hod" / "hod.json", {"training": ["A_CV_1"], "form": {"kind": "zheng"}})
    durable.write_json(tmp_path / "spectra" / spectra.FILE, {})
    rows = [metric_row("n/truth", box, 50) for box in ("A_CV_0", "A_CV_1", "B_CV_0")]
    rows += [metric_row("n/net", box, n) for box, n in (("A_CV_0", 40), ("A_CV_1", 60), ("B_CV_0", 61.7))]
    rows += [metric_row("r/net/k0.3-3", box, r) for box, r in (("A_CV_0", 0.8), ("A_CV_1", 0.9))]
    rows += [metric_row("r/net/k0.3-3", "B_CV_0", 0.5, 0.02), metric_row("r/net/k0.3-3", "test", 0.7)]
    save_metrics(tmp_path / "spectra", rows)
    found = {"fields": {"truth": {}, "hod": {"confusion": [6, 4, 86, 4]}}}
    durable.write_json(tmp_path / "others" / fields.FILE, {"simulations": {"B_CV_0": found}})
    run = open_run(tmp_path)
    domains = Domains(run, list(run.steps.values()), stores, predictions)
    artist = Artist(run, tmp_path / "report", Palette([], []))
    return {table.name: table for table in domains.tables(artist, PUBLISHED["camels"])}


def texts(table: Table) -> dict[tuple[str, str], list[str]]:
    return {(row.head, row.note): [cell.text for cell in row.cells] for row in (*table.rows, *table.foot)}


def test_metrics_stand_by_where_models_were_trained_and_tested(tables: Mapping[str, Table]) -> None:
    table = tables["domains"]
    assert table.columns == ("model", "near", "far", "early")
    assert table.groups == (("trained on near", 3),)
    net = "some-regressor on some-classifier"
    found = texts(table)
    assert found[net, "recall [%]"] == ["80", "50", "50"]
    assert found[net, "precision [%]"] == ["80", "25", "25"]
    assert found[net, "with galaxies [%]"] == ["10", "10", "10"]
    assert found[net, "r, k = 0.3 to 3 h/Mpc"] == ["0.850 ± 0.050", "0.500 ± 0.020", ""]
    assert found[net, "galaxies / true galaxies"] == ["1.00 ± 0.20", "1.234", ""]
    assert found["HOD, zheng", "recall [%]"] == ["", "60", ""], "trained on today's boxes, not on early ones"
    recall = next(row for row in table.rows if (row.head, row.note) == (net, "recall [%]"))
    assert [cell.strong for cell in recall.cells] == [True, False, False]
    assert "near: A CV, z = 0; far: B CV, z = 0; early: A CV, z = 0.5" in table.caption


def test_confusions_have_their_balance_beside_them(tables: Mapping[str, Table]) -> None:
    found = texts(tables["voxels"])
    assert found["net", "near"] == ["96", "90", "80", "80", "10", "2.222"]
    assert found["net", "far"] == ["80", "90", "50", "25", "10", "16.67"]
    assert found["hod", "far"][2] == "60"
    # Both networks were tested on the same boxes, so their figures imply one share of voxels with galaxies.
    assert [found[name, "published"][4] for name in ("Inception", "R2U-Net")] == ["0.1021", "0.1021"]
    assert found["R2U-Net", "published"][:4] == ["98.24", "99.9", "94.16", "5.196"]


def test_the_balance_follows_from_three_ratios() -> None:
    for cells in (NEAR, FAR):
        share = implied_balance(cells.accuracy, cells.recall, cells.precision)
        assert share == pytest.approx((cells.true_positives + cells.false_negatives) / cells.total)
