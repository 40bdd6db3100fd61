"""R2U-Net on voxels, in two phases: which voxels hold galaxies, then how many.

Network: recurrent residual U-Net, Alom et al. 2018 (arXiv:1802.06955). Two phases and their losses: Zhang et
al. 2019 (arXiv:1902.05965); on CAMELS: Sether & Giusarma 2024.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field as Constraint
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, field_validator
from torch import Tensor, nn

from galdist.config import StrictModel
from galdist.data.transforms import Normalization, TransformName
from galdist.grids.store import Field
from galdist.models import Batch, GridObjective, ModelConfig, Objective, TrainingFields
from galdist.models.layers import RecurrentResidualBlock, trim
from galdist.statistics.metrics import ScoreHistogram
from galdist.training.losses import (
    unweighted_mean,
    weighted_cross_entropy,
    weighted_squared_error,
)


class R2UNet(nn.Module):
    """Recurrent residual U-Net in 3-D: a block a level going down and another going up, skips between them.

    Parameters
    ----------
    n_in, n_out
        channels of the mesh that comes in, and of the one that goes out.
    channels
        channels of each level; each level has half the cells a side of the one before.
    recurrence
        t of the recurrent convolutions.
    """

    def __init__(self, n_in: int, n_out: int, channels: Sequence[int], recurrence: int) -> None:
        super().__init__()
        pairs = list(pairwise(channels))
        self.down = nn.ModuleList(
            RecurrentResidualBlock(before, after, recurrence)
            for before, after in zip((n_in, *channels[:-1]), channels, strict=True)
        )
        self.expand = nn.ModuleList(nn.ConvTranspose3d(coarse, fine, 2, stride=2) for fine, coarse in pairs)
        self.up = nn.ModuleList(RecurrentResidualBlock(2 * fine, fine, recurrence) for fine, _ in pairs)
        self.head = nn.Linear(channels[0], n_out)
        self.alignment = 2 ** len(pairs)

    @property
    def reach(self) -> int:
        """Cells from an output to the furthest input that it depends on."""
        levels = [block.reach() for block in self.down if isinstance(block, RecurrentResidualBlock)]
        reach = levels[-1]
        for level in reversed(levels[:-1]):
            # A coarse cell is two fine ones, and the output may lie in either.
            reach = 2 * level + 2 * reach + 1
        return reach

    def forward(self, x: Tensor, periodic: bool) -> Tensor:
        """``(batch, n_in, z, y, x)`` -> ``(batch, n_out, z, y, x)``, float32 whatever the autocast.

        Beyond its faces the mesh continues with itself where it is ``periodic``, else with zeros.
        """
        skips: list[Tensor] = []
        for level, block in enumerate(self.down):
            x = block(x if level == 0 else F.max_pool3d(x, 2), periodic)
            skips.append(x)
        x = skips.pop()
        for expand, block in zip(reversed(self.expand), reversed(self.up), strict=True):
            x = block(torch.cat([expand(x), skips.pop()], 1), periodic)
        with torch.autocast(x.device.type, enabled=False):
            # Eight bits are too few for log-odds near a threshold.
            # As a linear map of the last axis it keeps the memory order of its input, in its gradient too.
            output: Tensor = self.head(x.movedim(1, -1).to(self.head.weight.dtype)).movedim(-1, 1)
            return output


class InputConfig(StrictModel):
    """A field that the network sees."""

    field: str
    components: Literal[1, 3] = 1
    """3 for vector fields."""
    normalization: tuple[TransformName, ...] = ("log1p", "standardize")
    """Applied in this order; fitted to the training split and saved with the weights."""


class R2UNetConfig(ModelConfig):
    """What both phases have in common. Defaults are the papers'."""

    inputs: Annotated[tuple[InputConfig, ...], Constraint(min_length=1)] = (
        InputConfig(field="matter_counts"),
    )
    target: str = "galaxy_counts"
    """Field of counts to predict."""
    channels: Annotated[tuple[PositiveInt, ...], Constraint(min_length=1)] = (32, 64, 128, 256)
    recurrence: NonNegativeInt = 2

    @field_validator("inputs")
    @classmethod
    def _once(cls, inputs: tuple[InputConfig, ...]) -> tuple[InputConfig, ...]:
        if len({entry.field for entry in inputs}) < len(inputs):
            raise ValueError("a field is given twice")
        return inputs


class R2UNetClassifierConfig(R2UNetConfig):
    """Phase 1: which voxels hold a galaxy."""

    name: Literal["r2unet-classifier"] = "r2unet-classifier"
    positive_weight: PositiveFloat = 80.0
    """w of the class weights [1, w]/(1 + w)."""
    recall: Annotated[float, Constraint(gt=0, le=1)] = 0.95
    """The threshold is the highest at which this fraction of the validation voxels with galaxies is kept."""


class R2UNetRegressorConfig(R2UNetConfig):
    """Phase 2: how many galaxies the kept voxels hold."""

    name: Literal["r2unet-regressor"] = "r2unet-regressor"
    nonempty_weight: PositiveFloat = 1.0
    """Weight of the squared error in voxels that hold galaxies; in others it is 1."""


class _Voxels(GridObjective):
    """A network from input fields to one number a voxel."""

    nonempty_fraction: Tensor

    def __init__(self, config: R2UNetConfig) -> None:
        super().__init__()
        self._channels = tuple((entry.field, entry.components) for entry in config.inputs)
        self.inputs = tuple(entry.field for entry in config.inputs)
        self.target = config.target
        self.fields = (*self.inputs, self.target)
        self.normalizations = nn.ModuleList(Normalization(entry.normalization) for entry in config.inputs)
        n_in = sum(entry.components for entry in config.inputs)
        self.network = R2UNet(n_in, 1, config.channels, config.recurrence)
        self.alignment = self.network.alignment
        self.reach = self.network.reach
        self.register_buffer("nonempty_fraction", torch.ones(()))

    def prepare(self, training: TrainingFields) -> None:
        for (field, _), normalization in zip(self._channels, self.normalizations, strict=True):
            assert isinstance(normalization, Normalization)
            normalization.fit(partial(training, field))
        voxels = nonempty = 0
        for counts in training(self.target):
            voxels += counts.size
            nonempty += int(np.count_nonzero(counts))
        if not 0 < nonempty < voxels:
            raise ValueError(
                f"field {self.target!r} is non-zero in {nonempty} of {voxels} voxels of the training boxes: "
                "there is nothing to learn; check the galaxy catalogs and the ingest step's min_stellar_mass"
            )
        self.nonempty_fraction.fill_(nonempty / voxels)

    def _raw(self, batch: Batch) -> Tensor:
        """Output of the network without the halo, ``(batch, 1, z, y, x)``."""
        channels = []
        for (field, n), normalization in zip(self._channels, self.normalizations, strict=True):
            if batch[field].shape[1] != n:
                raise ValueError(
                    f"model.inputs: field {field!r} has {batch[field].shape[1]} components, not the {n} that "
                    "were given"
                )
            channels.append(normalization(batch[field]))
        return trim(self.network(torch.cat(channels, 1), batch["periodic"]), batch["halo"])

    def _truth(self, batch: Batch) -> Tensor:
        return trim(batch[self.target], batch["halo"])


class R2UNetClassifier(_Voxels):
    """Probability that a voxel holds a galaxy, learned by weighted cross-entropy.

    Predictions are probabilities: the class weight that training needs is divided out again.
    """

    Config: ClassVar[type[ModelConfig]] = R2UNetClassifierConfig
    config: R2UNetClassifierConfig
    threshold: Tensor
    """Voxels whose probability reaches it are taken to hold galaxies."""

    def __init__(self, config: R2UNetClassifierConfig, parts: Sequence[Objective] = ()) -> None:
        if parts:
            raise ValueError(
                f"{config.name} builds on no other model, but {len(parts)} were given as `models`"
            )
        super().__init__(config)
        self.config = config
        self.outputs = (Field(name="galaxy_probability"),)
        # The paper's 0.5 before the class weight is divided out; `calibrate` chooses a better one.
        self.register_buffer("threshold", torch.tensor(1 / (1 + config.positive_weight)))

    def prepare(self, training: TrainingFields) -> None:
        super().prepare(training)
        odds = self.nonempty_fraction / (1 - self.nonempty_fraction) * self.config.positive_weight
        with torch.no_grad():
            self.network.head.weight.mul_(0.1)  # starts from the class balance alone
            self.network.head.bias.fill_(odds.log().item())

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        w, fraction = self.config.positive_weight, self.nonempty_fraction
        mean_weight = (1 - fraction + w * fraction) / (1 + w)
        return weighted_cross_entropy(logits, labels, w).mean() / mean_weight

    def _probability(self, logits: Tensor) -> Tensor:
        # Weighted cross-entropy teaches the log-odds plus ln w.
        return torch.sigmoid(logits - float(np.log(self.config.positive_weight)))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return {"loss": self._loss(self._raw(batch), (self._truth(batch) > 0).float())}

    def probability(self, batch: Batch) -> Tensor:
        """Probability that each voxel inside the halo holds a galaxy, ``(batch, 1, z, y, x)``."""
        return self._probability(self._raw(batch))

    def predict(self, batch: Batch) -> dict[str, Tensor]:
        return {"galaxy_probability": self.probability(batch)}

    def evaluate(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        logits, labels = self._raw(batch), self._truth(batch) > 0
        probability = self._probability(logits)
        loss = self._loss(logits, labels.float()).double() * labels.numel()
        sums = {
            "loss": loss,
            "voxels": torch.tensor(labels.numel()),
            "scores": score_counts(probability, labels),
        }
        return sums, {"galaxy_probability": probability}

    def calibrate(self, sums: Mapping[str, Tensor]) -> None:
        histogram = ScoreHistogram(sums["scores"].numpy())
        self.threshold.fill_(histogram.threshold_for_recall(self.config.recall))

    def summarize(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        return {
            "loss": sums["loss"].item() / sums["voxels"].item(),
            **classification(sums["scores"], self.threshold),
        }


class R2UNetRegressor(_Voxels):
    """Mean number of galaxies in the voxels that a trained classifier keeps, by weighted squared error; 0
    elsewhere.

    The classifier is frozen and travels with the weights. Predictions are means: the weight on voxels with
    galaxies is divided out again, with the classifier's probability
    (`galdist.training.losses.unweighted_mean`).
    """

    Config: ClassVar[type[ModelConfig]] = R2UNetRegressorConfig
    config: R2UNetRegressorConfig

    def __init__(self, config: R2UNetRegressorConfig, parts: Sequence[Objective] = ()) -> None:
        if len(parts) != 1 or not isinstance(parts[0], R2UNetClassifier):
            given = ", ".join(part.config.name for part in parts) or "none"
            raise ValueError(
                f"{config.name} builds on one trained classifier; `models` gives {given}: name the step that "
                "trained it"
            )
        super().__init__(config)
        self.config = config
        self.classifier: R2UNetClassifier = parts[0]
        self.classifier.requires_grad_(False)
        self.parts = (self.classifier,)
        if self.classifier.target != self.target:
            raise ValueError(
                f"model.target is {self.target!r} but the classifier was trained on "
                f"{self.classifier.target!r}"
            )
        self.inputs = tuple(dict.fromkeys((*self.inputs, *self.classifier.inputs)))
        self.fields = (*self.inputs, self.target)
        self.alignment = max(self.alignment, self.classifier.alignment)
        self.reach = max(self.reach, self.classifier.reach)
        self.outputs = (Field(name=self.target), Field(name="galaxy_probability"))

    def _means(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """The network's mean, weighted; the classifier's probability; and whether it keeps the voxel."""
        with torch.no_grad():
            probability = self.classifier.probability(batch)
        return F.softplus(self._raw(batch)), probability, probability >= self.classifier.threshold

    def _loss(self, mean: Tensor, counts: Tensor, kept: Tensor) -> Tensor:
        error = weighted_squared_error(mean, counts, self.config.nonempty_weight) * kept
        return error.mean() / self.nonempty_fraction

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        mean, _, kept = self._means(batch)
        return {"loss": self._loss(mean, self._truth(batch), kept)}

    def _fields(self, mean: Tensor, probability: Tensor, kept: Tensor) -> dict[str, Tensor]:
        counts = unweighted_mean(mean, probability, self.config.nonempty_weight) * kept
        return {self.target: counts, "galaxy_probability": probability}

    def predict(self, batch: Batch) -> dict[str, Tensor]:
        return self._fields(*self._means(batch))

    def evaluate(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        mean, probability, kept = self._means(batch)
        truth = self._truth(batch)
        fields = self._fields(mean, probability, kept)
        n, m = truth.double(), fields[self.target].double()
        sums = {
            "loss": self._loss(mean, truth, kept).double() * truth.numel(),
            "voxels": torch.tensor(truth.numel()),
            "scores": score_counts(probability, truth > 0),
            "moments": torch.stack([n.sum(), m.sum(), n.square().sum(), m.square().sum(), (n * m).sum()]),
        }
        return sums, fields

    def summarize(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        voxels = sums["voxels"].item()
        n, m, nn_, mm, nm = (sums["moments"] / voxels).tolist()
        spread = ((nn_ - n * n) * (mm - m * m)) ** 0.5
        return {
            "loss": sums["loss"].item() / voxels,
            **classification(sums["scores"], self.classifier.threshold),
            "rmse": max(nn_ - 2 * nm + mm, 0.0) ** 0.5,
            "correlation": (nm - n * m) / spread if spread > 0 else 0.0,
            "count_ratio": m / n if n > 0 else 0.0,
        }


def score_counts(probability: Tensor, labels: Tensor) -> Tensor:
    """Counts of a `ScoreHistogram`: they add over batches and ranks."""
    histogram = ScoreHistogram()
    histogram.add(probability.cpu().numpy(), labels.cpu().numpy())
    return torch.from_numpy(histogram.counts)


def classification(scores: Tensor, threshold: Tensor) -> dict[str, float]:
    """Confusion and its ratios at the threshold, and the area under the precision-recall curve."""
    histogram = ScoreHistogram(scores.numpy())
    confusion = histogram.confusion(threshold.item())
    metrics: dict[str, Any] = {
        "accuracy": confusion.accuracy,
        "recall": confusion.recall,
        "precision": confusion.precision,
        "pr_auc": histogram.pr_auc(),
        "threshold": threshold.item(),
        "true_positives": confusion.true_positives,
        "false_positives": confusion.false_positives,
        "true_negatives": confusion.true_negatives,
        "false_negatives": confusion.false_negatives,
    }
    return metrics
