"""Galaxies at several redshifts: networks that are told the redshift, and what is left at another one."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from small_grids import CLASSIFIER, make_grids

import galdist
from galdist.grids.store import create_store, open_store
from galdist.training.predict import PredictConfig, predict
from galdist.training.train import TrainConfig, train

DENSITY = {0.0: 0.05, 1.0: 0.25}
"""Galaxies a cell, by redshift, whatever the matter."""


def at_redshift(step: Path, redshift: float) -> Path:
    """The same boxes of matter at any redshift, and the galaxies of that redshift."""
    made = make_grids(step / "all")
    fields = [made["box_0"].field(field) for field in ("matter_counts", "galaxy_counts")]
    attrs = [made[name].attrs.model_copy(update={"redshift": redshift}) for name in made]
    store = create_store(step / "grids.zarr", attrs, fields, made.n_mesh)
    random = np.random.default_rng(int(redshift))
    for name in store:
        matter = made[name].read("matter_counts")
        store[name].write("matter_counts", matter)
        store[name].write("galaxy_counts", random.poisson(DENSITY[redshift], matter.shape).astype("f4"))
    return step


def test_a_network_that_is_told_the_redshift_has_its_number_of_galaxies(tmp_path: Path) -> None:
    grids = {redshift: at_redshift(tmp_path / f"z{redshift:g}", redshift) for redshift in DENSITY}
    model = {"name": "inception-regressor", "branches": [1, 1, 1, 1], "loss": "negative-binomial"}
    numbers = {}
    for told in (True, False):
        config = CLASSIFIER | {
            "model": model | ({"parameters": ["redshift"]} if told else {}),
            "epochs": 30,
            "optimizer": {"learning_rate": 3e-2},
        }
        step = tmp_path / f"told-{told}"
        train(TrainConfig(**config), {"grids": list(grids.values())}, step)
        for redshift, where in grids.items():
            out = tmp_path / f"told-{told}-{redshift:g}"
            predict(PredictConfig(), {"grids": [where], "model": [step]}, out)
            numbers[told, redshift] = (
                open_store(out / "prediction.zarr")["box_3"].read("galaxy_counts").mean()
            )
    for redshift, density in DENSITY.items():
        assert numbers[True, redshift] == pytest.approx(density, rel=0.15)
    assert numbers[False, 0.0] == numbers[False, 1.0]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_redshift_transfer_on_mock_universes(tmp_path: Path) -> None:
    """Trained at z = 0 and tested at z = 0.47, from simulation to the table of domains."""
    pytest.importorskip("nbodykit", reason="nbodykit is not installed: run `make setup`")
    boxes = {"n_mesh": 16, "min_stellar_mass": 1e9, "split": {"validation": [2], "test": [3]}}
    catalog = {key: boxes[key] for key in ("min_stellar_mass", "split")}
    network = {"name": "r2unet-regressor", "channels": [4, 8], "loss": "negative-binomial"}
    network["inputs"] = [{"field": "matter_counts", "normalization": ["standardize"]}]
    training = {
        "epochs": 2,
        "batch_size": 4,
        "data": {"crop": 8, "crops_per_box": 8, "halo": 4, "workers": 0},
    }
    here = {"simulations": ["universe"]}

    def step(name: str, stage: str, inputs: dict[str, list[str]], **config: object) -> dict[str, object]:
        return {"name": name, "stage": stage, "inputs": inputs, "config": config}

    steps = [
        {
            "name": "universe",
            "stage": "simulate",
            "config": {"simulations": 4, "box_size": 12.5, "n_particles": 24, "mesh_factor": 2}
            | {"redshifts": [0.0, 0.47]},
        },
        step("today", "ingest", here, **boxes),
        step("early", "ingest", here, **boxes, redshift=0.47),
        step("today-galaxies", "catalog", here, **catalog),
        step("early-galaxies", "catalog", here, **catalog, redshift=0.47),
        step("counts", "train", {"grids": ["today"]}, model=network, **training),
        step(
            "told",
            "train",
            {"grids": ["today", "early"]},
            model=network | {"parameters": ["redshift"]},
            **training,
        ),
        step("draws", "predict", {"grids": ["early"], "model": ["counts"]}, samples=1, tile=16, halo=4),
        step("draws-today", "predict", {"grids": ["today"], "model": ["counts"]}, tile=16, halo=4),
        step("draws-told", "predict", {"grids": ["early"], "model": ["told"]}, samples=1, tile=16, halo=4),
        step(
            "hod", "hod", {"training": ["today-galaxies"], "catalogs": ["early-galaxies"], "grids": ["early"]}
        ),
        step(
            "spectra",
            "spectra",
            {
                "grids": ["early"],
                "predictions": ["draws", "draws-told", "hod"],
                "catalogs": ["early-galaxies"],
            },
            band=[0.5, 3],
            power_bands=[[0.5, 3]],
        ),
        step("report", "report", {"steps": "*"}),  # type: ignore[dict-item]
    ]
    file = tmp_path / "transfer.yaml"
    file.write_text(yaml.safe_dump({"name": "transfer", "seed": 1, "steps": steps}))
    command = [
        sys.executable,
        "-m",
        "galdist",
        "run",
        str(file),
        "--site",
        "debug",
        "--out",
        str(tmp_path / "run"),
    ]
    log = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=1500)
    assert log.returncode == 0, log.stdout[-3000:]
    run = galdist.open_run(tmp_path / "run")

    redshifts = {
        name: {
            g.attrs.redshift
            for g in map(open_store(run.steps[name].path / "grids.zarr").__getitem__, ["MockA_CV_3"])
        }
        for name in ("today", "early")
    }
    assert redshifts["today"] == {0.0}
    assert redshifts["early"].pop() == pytest.approx(0.468, abs=1e-3)
    assert "is at redshift 0.468" in log.stdout
    model = yaml.safe_load((run.steps["told"].path / "model" / "model.yaml").read_text())
    assert model["grids"]["redshift"] == [0.0, pytest.approx(0.468, abs=1e-3)]

    found = run.spectra("spectra")["simulations"]["MockA_CV_3"]
    assert {"truth", "hod"} == set(found["multipoles"])
    assert {"truth", "matter", "draws", "draws-told", "hod"} <= set(found["fields"])
    for poles in found["multipoles"].values():
        assert np.isfinite(poles["monopole"]).all()
    page = (run.steps["report"].path / "report.html").read_text()
    assert "in redshift space" in page
    assert "early: MockA CV, z = 0.47" in page
