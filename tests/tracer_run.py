"""Catalogues and predictions on disk for the stage `tracers`, small or of any size."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from galdist.catalogs.catalog import CatalogWriter
from galdist.catalogs.centrals import SPLITS, TABLE
from galdist.catalogs.samples import create_samples
from galdist.grids.store import SimulationAttrs

BOX = 100.0
# A galaxy in the middle of each tracer; 0 is a light red one.
GALAXIES = np.array(
    [(9.2, 1.2), (10.0, 1.2), (10.8, 1.2), (9.2, 0.9), (10.0, 0.9), (10.8, 0.9), (9.2, 0.5), (10.0, 0.5)]
)


def attrs(name: str = "box", box_size: float = BOX) -> SimulationAttrs:
    return SimulationAttrs(name=name, box_size=box_size, redshift=0.5, suite="mock")


def write_centrals(
    step: Path,
    position: NDArray[Any],
    tracers: NDArray[Any],
    split: NDArray[Any] | None = None,
    name: str = "box",
) -> Path:
    """A step `centrals` with galaxies of ``tracers`` (n,); ``split`` (n,) holds places in `SPLITS`."""
    mass, color = GALAXIES[tracers].T
    if split is None:
        split = np.full(len(tracers), SPLITS.index("test"))
    columns = {"position": position, "log_stellar_mass": mass, "color_gi": color, "split": split.astype("i1")}
    writer = CatalogWriter(step / "catalog.zarr")
    writer.add(attrs(name), {TABLE: columns})
    writer.finish([name])
    return step


def write_samples(
    step: Path,
    draws: NDArray[Any],
    row: NDArray[Any] | None = None,
    label: str = "model",
    targets: tuple[str, ...] = ("color_gi", "log_stellar_mass"),
) -> Path:
    """A step with predictions of ``draws`` (n, S) tracers for halos ``row`` (n,), else all."""
    n = len(draws)
    row = np.arange(n) if row is None else row
    columns = {"log_stellar_mass": 0, "color_gi": 1}
    values = GALAXIES[draws][:, :, [columns[target] for target in targets]]
    store = create_samples(step / "samples.zarr", [(attrs(), n)], targets, draws.shape[1], label, "mock")
    for start in store.starts("box"):
        part = slice(start, start + store.chunk)
        here = values[part]
        store.write("box", start, row[part], here.mean(axis=1), here, np.zeros(len(here), bool))
    return step
