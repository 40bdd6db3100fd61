"""Classifiers: a galaxy's properties are cut into classes, and a network gives each class a probability.

`nn-class` cuts one or two properties into equal bins (Rodrigues et al. 2023, MNRAS 522, 3236); `voronoi`
cuts any number of them into Voronoi cells, small where galaxies are many (Rodrigues et al. 2025, A&A 698,
A3).
"""

import abc
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import Field as Constraint
from pydantic import NonNegativeFloat, PositiveInt, model_validator
from scipy.spatial import cKDTree
from torch import Tensor, nn

from galdist.config import StrictModel
from galdist.models import Batch, ModelConfig, Objective, TrainingFields
from galdist.models.tables import Columns, TableConfig, TableObjective, Widths


class Bins(StrictModel):
    """Equal bins of a column, in its own units."""

    low: float
    high: float
    number: PositiveInt = 50

    @model_validator(mode="after")
    def _ordered(self) -> "Bins":
        if not self.low < self.high:
            raise ValueError(f"bins from {self.low} to {self.high}: `low` must be below `high`")
        return self

    @property
    def width(self) -> float:
        """Width of a bin."""
        return (self.high - self.low) / self.number


class ClassifierConfig(TableConfig):
    """What both classifiers have in common."""

    hidden: Widths
    """Widths of the hidden layers."""
    dropout: Annotated[float, Constraint(ge=0, lt=1)] = 0.0
    """Probability with which a hidden unit is dropped in training."""


class BinClassifierConfig(ClassifierConfig):
    """Equal bins; defaults are those of Rodrigues et al. 2023 and of the bins published with A&A 698, A3."""

    name: Literal["nn-class"] = "nn-class"
    targets: Columns = ("log_stellar_mass", "color_gi")
    """One or two columns; two share a class for each pair of bins."""
    bins: Mapping[str, Bins] = {
        "log_stellar_mass": Bins(low=8.75, high=13.0),
        "color_gi": Bins(low=-0.3, high=1.22),
        "log_ssfr": Bins(low=-17.0, high=-8.3),
        "log_radius": Bins(low=0.05, high=2.0),
    }
    """Bins of each target; those of other columns are ignored. A value outside belongs to the outermost
    bin."""
    hidden: Widths = (15, 15)
    dropout: Annotated[float, Constraint(ge=0, lt=1)] = 0.25

    @model_validator(mode="after")
    def _binned(self) -> "BinClassifierConfig":
        if len(self.targets) > 2:
            raise ValueError(
                f"nn-class takes one or two targets, not {len(self.targets)} ({', '.join(self.targets)}): "
                "their bins multiply; use the model `voronoi`"
            )
        if missing := [target for target in self.targets if target not in self.bins]:
            raise ValueError(
                f"bins: none are given for {', '.join(missing)}; give {{{missing[0]}: {{low: ..., high: ..., "
                "number: 50}}"
            )
        return self


class VoronoiConfig(ClassifierConfig):
    """Voronoi cells; number of cells and hidden layers are those that A&A 698, A3 ended with."""

    name: Literal["voronoi"] = "voronoi"
    cells: Annotated[int, Constraint(ge=2)] = 857
    """Cells at most; fewer where they would hold too few rows."""
    min_rows: PositiveInt = 20
    """Training rows that each cell holds at least."""
    members: PositiveInt = 256
    """Training rows of a cell that are kept to draw from; where it has more, a random choice of them."""
    spread: NonNegativeFloat = 1.0
    """Standard deviation of the noise added to a drawn member, in units of its cell's dispersion. 1 is the
    paper's, which widens every cell by 2^(1/2); 0 repeats training rows."""
    hidden: Widths = (225, 468, 125, 402, 33)


class _Classifier(TableObjective):
    """A network from the halo to the probabilities of classes, trained by cross-entropy."""

    config: ClassifierConfig

    def __init__(self, config: ClassifierConfig, n_classes: int, parts: Sequence[Objective]) -> None:
        super().__init__(config, parts)
        layers: list[nn.Module] = []
        for n_in, n_out in pairwise((len(self.inputs), *config.hidden)):
            layers += [nn.Linear(n_in, n_out), nn.ReLU()]
            if config.dropout:
                layers.append(nn.Dropout(config.dropout))
        self.network = nn.Sequential(*layers, nn.Linear(config.hidden[-1], n_classes))

    @abc.abstractmethod
    def labels(self, batch: Batch) -> Tensor:
        """The class of each row's targets, (b,) int64."""

    def logits(self, batch: Batch) -> Tensor:
        """Unnormalized log-probabilities of the classes, (b, classes)."""
        logits: Tensor = self.network(self.scaled_inputs(batch))
        return logits

    def probabilities(self, batch: Batch) -> Tensor:
        """Probabilities of the classes, (b, classes)."""
        return self.logits(batch).float().softmax(-1)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return {"loss": self.validation_loss(batch).mean()}

    def validation_loss(self, batch: Batch) -> Tensor:
        """Cross-entropy -ln p(class), (b,)."""
        return F.cross_entropy(self.logits(batch).float(), self.labels(batch), reduction="none")


class BinClassifier(_Classifier):
    """Probabilities of equal bins; the density within a bin is uniform.

    Draws are a class, then a value uniformly within it. `point` is the mean of the distribution.
    """

    Config: ClassVar[type[ModelConfig]] = BinClassifierConfig
    config: BinClassifierConfig

    def __init__(self, config: BinClassifierConfig, parts: Sequence[Objective] = ()) -> None:
        self.bins = tuple(config.bins[target] for target in config.targets)
        super().__init__(config, math.prod(bins.number for bins in self.bins), parts)

    def labels(self, batch: Batch) -> Tensor:
        label = torch.zeros(len(batch["targets"]), dtype=torch.int64, device=batch["targets"].device)
        for bins, values in zip(self.bins, batch["targets"].unbind(-1), strict=True):
            index = ((values - bins.low) / bins.width).floor().long()
            label = label * bins.number + index.clamp(0, bins.number - 1)
        return label

    def log_density(self, batch: Batch) -> Tensor:
        """ln p(targets | halo), (b,), per product of the targets' units; as if the outermost bins ended."""
        area = math.prod(bins.width for bins in self.bins)
        return -self.validation_loss(batch) - math.log(area)

    def _marginals(self, batch: Batch) -> list[Tensor]:
        """Probabilities (b, bins) of each target alone."""
        joint = self.probabilities(batch).unflatten(-1, [bins.number for bins in self.bins])
        others = [[d for d in range(1, joint.ndim) if d != i] for i in range(1, joint.ndim)]
        return [joint.sum(axes) if axes else joint for axes in others]

    def point(self, batch: Batch) -> Tensor:
        """Mean, (b, t)."""
        means = [
            bins.low + bins.width * (p @ (torch.arange(bins.number, device=p.device) + 0.5))
            for bins, p in zip(self.bins, self._marginals(batch), strict=True)
        ]
        return torch.stack(means, -1)

    def sample(self, batch: Batch, n: int, generator: torch.Generator) -> Tensor:
        p = self.probabilities(batch)
        label = torch.multinomial(p, n, replacement=True, generator=generator)
        within = torch.rand(*label.shape, len(self.bins), generator=generator, device=p.device)
        values = []
        for i in reversed(range(len(self.bins))):
            bins = self.bins[i]
            values.append(bins.low + bins.width * (label % bins.number + within[..., i]))
            label = label // bins.number
        return torch.stack(values[::-1], -1)

    def quantiles(self, batch: Batch, levels: Tensor) -> Tensor:
        columns = []
        for bins, p in zip(self.bins, self._marginals(batch), strict=True):
            cdf = p.double().cumsum(-1)
            level = (levels.double() * cdf[:, -1:]).contiguous()
            index = torch.searchsorted(cdf, level).clamp(max=bins.number - 1)
            inside = p.double().gather(-1, index)
            before = cdf.gather(-1, index) - inside
            fraction = ((level - before) / inside.clamp(min=torch.finfo(torch.float64).tiny)).clamp(0, 1)
            columns.append(bins.low + bins.width * (index + fraction))
        return torch.stack(columns, -1).float()


class VoronoiClassifier(_Classifier):
    """Probabilities of the Voronoi cells of the standardized targets.

    Draws are a cell, then one of its training rows, then Gaussian noise of `spread` times the cell's
    dispersion, as the paper has it. `point` is the mean of the cells' means. The paper joins neighboring
    cells, beginning with one for each galaxy, and leaves those at the edge alone: 264 of its 857 cells hold
    one galaxy. Here cells are those of k-means and no such cells remain; see `voronoi_centers`.
    """

    Config: ClassVar[type[ModelConfig]] = VoronoiConfig
    config: VoronoiConfig
    centers: Tensor
    """(cells, t), standardized; infinite where there are fewer cells than `config.cells`."""
    means: Tensor
    dispersions: Tensor
    """(cells, t), standardized: mean and standard deviation of a cell's training rows."""
    occupancy: Tensor
    """(cells,) training rows of each cell."""
    members: Tensor
    """(cells, members, t), standardized: training rows; the first `occupancy` of a cell count."""

    def __init__(self, config: VoronoiConfig, parts: Sequence[Objective] = ()) -> None:
        super().__init__(config, config.cells, parts)
        cells, t = config.cells, len(config.targets)
        self.register_buffer("centers", torch.full((cells, t), torch.inf))
        self.register_buffer("means", torch.zeros(cells, t))
        self.register_buffer("dispersions", torch.zeros(cells, t))
        self.register_buffer("occupancy", torch.zeros(cells, dtype=torch.int64))
        self.register_buffer("members", torch.zeros(cells, config.members, t))

    def prepare(self, training: TrainingFields) -> None:
        super().prepare(training)
        columns = [np.concatenate(list(training(target))) for target in self.targets]
        rows = torch.from_numpy(np.stack(columns, -1).astype(np.float32))
        points = self.scaled_targets({"targets": rows}).double().numpy()
        centers = voronoi_centers(points, self.config.cells, self.config.min_rows)
        self.centers[: len(centers)] = torch.from_numpy(centers)
        cell = self.labels({"targets": rows}).numpy()
        random = np.random.default_rng(0)
        for i in range(len(centers)):
            inside = np.flatnonzero(cell == i)
            self.occupancy[i] = len(inside)
            self.means[i] = torch.from_numpy(points[inside].mean(0))
            self.dispersions[i] = torch.from_numpy(points[inside].std(0))
            kept = random.permutation(inside)[: self.config.members]
            self.members[i, : len(kept)] = torch.from_numpy(points[kept])

    def labels(self, batch: Batch) -> Tensor:
        """The cell whose center is nearest, (b,) int64."""
        # Distances by the dot product would lose the digits that tell close centers apart.
        exactly = "donot_use_mm_for_euclid_dist"
        return torch.cdist(self.scaled_targets(batch), self.centers, compute_mode=exactly).argmin(-1)

    def logits(self, batch: Batch) -> Tensor:
        return super().logits(batch).masked_fill(self.occupancy == 0, -torch.inf)

    def point(self, batch: Batch) -> Tensor:
        """Mean, (b, t)."""
        return self.unscaled(self.probabilities(batch) @ self.means)

    def sample(self, batch: Batch, n: int, generator: torch.Generator) -> Tensor:
        p = self.probabilities(batch)
        cell = torch.multinomial(p, n, replacement=True, generator=generator)
        held = self.occupancy.clamp(max=self.config.members)[cell]
        which = (torch.rand(cell.shape, generator=generator, device=p.device) * held).long()
        member = self.members[cell, which.minimum(held - 1)]
        noise = torch.randn(member.shape, generator=generator, device=p.device)
        return self.unscaled(member + self.config.spread * self.dispersions[cell] * noise)


def voronoi_centers(points: NDArray[np.float64], n_cells: int, min_rows: int) -> NDArray[np.float64]:
    """Centers of Voronoi cells that share ``points`` out, none with fewer than ``min_rows`` of them.

    A tree of cuts through the widest direction gives cells of equal numbers, k-means (Lloyd's iterations)
    makes them compact; cells with too few points are then dissolved, and as many of the widest cut in two,
    again and again. The result depends on the points alone.

    Parameters
    ----------
    points
        (n, d).
    n_cells
        cells at most.
    min_rows
        points of each cell at least.

    Returns
    -------
    (k, d) centers, 1 <= k <= n_cells.

    Raises
    ------
    ValueError
        where there are fewer than ``min_rows`` points.
    """
    if len(points) < min_rows:
        raise ValueError(
            f"there are {len(points)} training rows, fewer than the {min_rows} that one cell holds "
            "(model.min_rows)"
        )
    leaves = _bisect(points, np.arange(len(points)), min(n_cells, len(points) // min_rows))
    centers = np.stack([points[leaf].mean(0) for leaf in leaves])
    for _ in range(_ROUNDS):
        for _ in range(_LLOYD):
            centers = _cell_means(points, centers, min_rows=1)
        full = _cell_means(points, centers, min_rows)
        if len(full) == n_cells:
            break
        centers = _split_widest(points, full, n_cells - len(full), min_rows)
    while True:
        # Dissolved cells' points go to others, which can only grow.
        _, cell = cKDTree(centers).query(points)
        enough = np.bincount(cell, minlength=len(centers)) >= min_rows
        if enough.all():
            return centers
        counts = np.bincount(cell, minlength=len(centers))
        centers = np.delete(centers, counts.argmin(), axis=0)


_ROUNDS = 8  # of dissolving and cutting; after these fewer cells are left than were asked for
_LLOYD = 5  # k-means iterations between two rounds


def _bisect(points: NDArray[Any], rows: NDArray[Any], n: int) -> list[NDArray[Any]]:
    """Share ``rows`` out over n leaves, evenly."""
    if n <= 1:
        return [rows]
    axis = points[rows].std(0).argmax()
    at = len(rows) * (n // 2) // n
    order = rows[np.argpartition(points[rows, axis], at)]
    return _bisect(points, order[:at], n // 2) + _bisect(points, order[at:], n - n // 2)


def _cell_means(points: NDArray[Any], centers: NDArray[Any], min_rows: int) -> NDArray[Any]:
    """Means of the cells' points, without the cells that have fewer than ``min_rows``."""
    _, cell = cKDTree(centers).query(points)
    counts = np.bincount(cell, minlength=len(centers))
    sums = np.stack([np.bincount(cell, values, len(centers)) for values in points.T], -1)
    kept = counts >= min_rows
    return sums[kept] / counts[kept, None]


def _split_widest(points: NDArray[Any], centers: NDArray[Any], n: int, min_rows: int) -> NDArray[Any]:
    """Cut n cells in two: those with the largest sum of squared distances, of those with points enough."""
    distance, cell = cKDTree(centers).query(points)
    counts = np.bincount(cell, minlength=len(centers))
    spread = np.where(counts >= 2 * min_rows, np.bincount(cell, distance**2, len(centers)), 0.0)
    chosen = [i for i in np.argsort(spread)[::-1][:n] if spread[i] > 0]
    halves = [points[half].mean(0) for i in chosen for half in _bisect(points, np.flatnonzero(cell == i), 2)]
    return np.concatenate([np.delete(centers, chosen, axis=0), np.reshape(halves, (-1, centers.shape[1]))])
