"""Galaxies on voxels in two phases: which voxels hold any, then how many.

Phases and weighted losses: Zhang et al. 2019 (arXiv:1902.05965); on CAMELS: Sether & Giusarma 2024. Each
phase is an objective over a network that its settings choose (`galdist.models.r2unet`,
`galdist.models.inception`); any regressor stands on any classifier, or on none where it learns a distribution
of counts.
"""

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field as Constraint
from pydantic import NonNegativeFloat, PositiveFloat, field_validator, model_validator
from torch import Tensor, nn

from galdist.config import StrictModel
from galdist.data.transforms import Normalization, TransformName
from galdist.grids.store import Field
from galdist.models import Batch, GridObjective, ModelConfig, Objective, TrainingFields
from galdist.models.conditioning import Embedding, ParameterNames
from galdist.models.counts import Counts, Likelihood
from galdist.models.layers import BlockNetwork, trim
from galdist.statistics.metrics import ScoreHistogram
from galdist.training.losses import (
    dice,
    dice_sums,
    focal,
    focal_log_odds,
    focal_logit,
    unweighted_mean,
    weighted_cross_entropy,
    weighted_squared_error,
)

_FEATURES = 64  # of the embedding of a simulation's parameters
_IMPOSSIBLE = -30.0  # ln of the probability of galaxies where the classifier keeps none


class VoxelNetwork(BlockNetwork, abc.ABC):
    """A network from meshes to as many numbers in each voxel as its `head` gives.

    It is local and sees one sample at a time (`galdist.models.layers`).
    """

    alignment: int
    """Origins of tiles are multiples of it."""
    head: nn.Linear
    """The last layer, of each voxel by itself."""

    @property
    @abc.abstractmethod
    def reach(self) -> int:
        """Cells from an output to the furthest input that it depends on."""

    @abc.abstractmethod
    def body(self, x: Tensor, periodic: bool, features: Tensor | None) -> Tensor:
        """``(batch, n_in, z, y, x)`` -> what the head is given, ``(batch, channels, z, y, x)``."""

    def forward(self, x: Tensor, periodic: bool, features: Tensor | None = None) -> Tensor:
        """``(batch, n_in, z, y, x)`` -> ``(batch, n_out, z, y, x)``, float32 whatever the autocast.

        Beyond its faces the mesh continues with itself where it is ``periodic``, else with zeros.
        ``features`` ``(batch, features)`` are what the samples are conditioned on, for networks that were
        made for any.
        """
        x = self.body(x, periodic, features)
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
    normalization: tuple[TransformName, ...] = Constraint(
        default_factory=lambda given: ("scale",) if given.get("components") == 3 else ("log1p", "standardize")
    )
    """Applied in this order; fitted to the training split and saved with the weights. By default `log1p` and
    `standardize`; of vectors `scale`."""

    @model_validator(mode="after")
    def _logarithms_are_of_scalars(self) -> "InputConfig":
        if self.components > 1 and "log1p" in self.normalization:
            raise ValueError(
                f"field {self.field!r} is a vector, whose components may be negative, and log1p cannot take "
                "them: leave its normalization out, or set it to [standardize]"
            )
        return self


class VoxelConfig(ModelConfig):
    """What both phases have in common, whatever the network. Defaults are the papers'."""

    inputs: Annotated[tuple[InputConfig, ...], Constraint(min_length=1)] = (
        InputConfig(field="matter_counts"),
    )
    target: str = "galaxy_counts"
    """Field of counts to predict."""
    parameters: ParameterNames = ()
    """Parameters of the simulation that the network is conditioned on: `Omega_m`, `A_SN1`, `redshift`."""
    checkpoint_activations: bool = False
    """Compute activations again for the gradient instead of keeping them: for large crops."""

    @property
    def reads(self) -> tuple[str, ...]:
        return (*(entry.field for entry in self.inputs), self.target)

    @field_validator("inputs")
    @classmethod
    def _once(cls, inputs: tuple[InputConfig, ...]) -> tuple[InputConfig, ...]:
        if len({entry.field for entry in inputs}) < len(inputs):
            raise ValueError("a field is given twice")
        return inputs

    def network(self, n_in: int, n_out: int, features: int) -> VoxelNetwork:
        """The network, for ``n_in`` channels that come in, ``n_out`` that go out, and ``features`` that it is
        conditioned on (0: none)."""
        raise NotImplementedError


class ClassifierConfig(VoxelConfig):
    """Phase 1: which voxels hold a galaxy."""

    loss: Literal["cross-entropy", "focal", "dice"] = "cross-entropy"
    positive_weight: PositiveFloat = 80.0
    """w of the class weights [1, w]/(1 + w), of cross-entropy and focal loss."""
    focusing: NonNegativeFloat = 2.0
    """Of the focal loss; 0 makes it cross-entropy."""
    recall: Annotated[float, Constraint(gt=0, le=1)] = 0.95
    """The threshold is the highest at which this fraction of the validation voxels with galaxies is kept."""


class RegressorConfig(VoxelConfig):
    """Phase 2: how many galaxies the kept voxels hold."""

    loss: Literal["squared-error"] | Likelihood = "squared-error"
    """Squared error teaches the mean; a likelihood teaches the distribution, which can be drawn from."""
    nonempty_weight: PositiveFloat = 1.0
    """Weight of the squared error in voxels that hold galaxies; in others it is 1."""
    recall: Annotated[float, Constraint(gt=0, le=1)] = 0.95
    """Where there is no classifier: of the threshold at which metrics call a voxel occupied."""

    @model_validator(mode="after")
    def _a_likelihood_has_no_weights(self) -> "RegressorConfig":
        if self.loss != "squared-error" and self.nonempty_weight != 1:
            raise ValueError(
                f"nonempty_weight is {self.nonempty_weight} but the loss is {self.loss}: a weight would bias "
                "the distribution; leave it out"
            )
        return self

    @property
    def likelihood(self) -> Likelihood | None:
        """What it learns the distribution of counts by; None where it learns their mean."""
        return None if self.loss == "squared-error" else self.loss

    @property
    def drawn(self) -> tuple[str, ...]:
        return () if self.likelihood is None else (self.target,)

    def check_parts(self, parts: Sequence[ModelConfig]) -> None:
        if self.likelihood is not None and not parts:
            return
        if len(parts) != 1 or not isinstance(parts[0], ClassifierConfig):
            given = ", ".join(part.name for part in parts) or "none"
            raise ValueError(
                f"{self.name} builds on one trained classifier; `models` gives {given}: name the step that "
                f"trained it, or choose a likelihood as its loss ({', '.join(get_args(Likelihood))}), which "
                "needs none"
            )
        if parts[0].target != self.target:
            raise ValueError(
                f"model.target is {self.target!r} but the classifier was trained on {parts[0].target!r}"
            )


class VoxelObjective(GridObjective):
    """A network from input fields to numbers in each voxel."""

    nonempty_fraction: Tensor

    def __init__(self, config: VoxelConfig, n_out: int = 1) -> None:
        super().__init__()
        self._channels = tuple((entry.field, entry.components) for entry in config.inputs)
        self.inputs = tuple(entry.field for entry in config.inputs)
        self.target = config.target
        self.fields = config.reads
        self.simulation_parameters = config.parameters
        self.normalizations = nn.ModuleList(Normalization(entry.normalization) for entry in config.inputs)
        self.embedding = Embedding(config.parameters, _FEATURES) if config.parameters else None
        n_in = sum(entry.components for entry in config.inputs)
        self.network = config.network(n_in, n_out, _FEATURES if config.parameters else 0)
        self.network.checkpoint_activations = config.checkpoint_activations
        self.alignment = self.network.alignment
        self.reach = self.network.reach
        self.register_buffer("nonempty_fraction", torch.ones(()))

    def prepare(self, training: TrainingFields) -> None:
        for (field, _), normalization in zip(self._channels, self.normalizations, strict=True):
            assert isinstance(normalization, Normalization)
            normalization.fit(partial(training, field))
        if self.embedding is not None:
            self.embedding.standardize.fit(training)
        voxels = nonempty = 0
        galaxies = 0.0
        for counts in training(self.target):
            voxels += counts.size
            nonempty += int(np.count_nonzero(counts))
            galaxies += float(counts.sum(dtype=np.float64))
        if not 0 < nonempty < voxels:
            raise ValueError(
                f"field {self.target!r} is non-zero in {nonempty} of {voxels} voxels of the training boxes: "
                "there is nothing to learn; check the galaxy catalogs and the ingest step's min_stellar_mass"
            )
        self.nonempty_fraction.fill_(nonempty / voxels)
        with torch.no_grad():
            self._start(nonempty / voxels, galaxies / voxels)

    def _start(self, fraction: float, mean: float) -> None:
        """Tell the untrained head the fraction of occupied voxels and the mean count, where that helps."""

    def _start_head(self, bias: Sequence[float] | Tensor) -> None:
        head = self.network.head
        head.weight.mul_(0.1)  # starts from the balance alone
        head.bias.copy_(torch.as_tensor(bias))

    def _raw(self, batch: Batch) -> Tensor:
        """Output of the network without the halo, ``(batch, n_out, z, y, x)``."""
        channels = []
        for (field, n), normalization in zip(self._channels, self.normalizations, strict=True):
            if batch[field].shape[1] != n:
                raise ValueError(
                    f"model.inputs: field {field!r} has {batch[field].shape[1]} components, not the {n} that "
                    "were given"
                )
            channels.append(normalization(batch[field]))
        features = None
        if self.embedding is not None:
            place = [self.simulation_parameters.index(name) for name in self.embedding.standardize.names]
            features = self.embedding(batch["parameters"][:, place])
        return trim(self.network(torch.cat(channels, 1), batch["periodic"], features), batch["halo"])

    def _truth(self, batch: Batch) -> Tensor:
        return trim(batch[self.target], batch["halo"])


class VoxelClassifier(VoxelObjective):
    """Probability that a voxel holds a galaxy.

    What is predicted are probabilities, whatever the loss. Weighted cross-entropy and the focal loss are
    least at scores that the probability alone decides, so that it follows from them. The Dice loss is least
    at scores that are the probability over the Dice coefficient, and 1 beyond: there, a straight line takes
    their log-odds to those of the validation split (Platt 1999).

    A voxel is called occupied where its score reaches the threshold, which is chosen by recall.
    """

    config: ClassifierConfig
    threshold: Tensor
    """Voxels whose score reaches it are taken to hold galaxies. Scores are the probabilities, but Dice's."""
    line: Tensor
    """Slope and offset of Platt's line, where the loss is Dice's."""

    def __init__(self, config: ClassifierConfig, parts: Sequence[Objective] = ()) -> None:
        super().__init__(config)
        self.config = config
        self.outputs = (Field(name="galaxy_probability"),)
        # The paper's 0.5 before the class weight is divided out; `calibrate` chooses a better one.
        self.register_buffer("threshold", self._score(torch.zeros(())))
        if config.loss == "dice":
            self.register_buffer("line", torch.tensor([1.0, 0.0]))

    def _start(self, fraction: float, mean: float) -> None:
        logit = float(np.log(fraction / (1 - fraction)))
        if self.config.loss != "dice":
            logit += float(np.log(self.config.positive_weight))
        if self.config.loss == "focal":
            logit = focal_logit(logit, self.config.focusing)
        self._start_head([logit])

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.config.loss == "dice":
            return dice(dice_sums(logits, labels)).mean()
        w, fraction = self.config.positive_weight, self.nonempty_fraction
        mean_weight = (1 - fraction + w * fraction) / (1 + w)
        if self.config.loss == "focal":
            return focal(logits, labels, w, self.config.focusing).mean() / mean_weight
        return weighted_cross_entropy(logits, labels, w).mean() / mean_weight

    def _score(self, logits: Tensor) -> Tensor:
        log_w = float(np.log(self.config.positive_weight))
        if self.config.loss == "focal":
            return torch.sigmoid(focal_log_odds(logits, self.config.focusing) - log_w)
        # Weighted cross-entropy teaches the log-odds plus ln w.
        return torch.sigmoid(logits - log_w if self.config.loss == "cross-entropy" else logits)

    def _probability(self, logits: Tensor) -> Tensor:
        if self.config.loss == "dice":
            return torch.sigmoid(self.line[0] * logits + self.line[1])
        return self._score(logits)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return {"loss": self._loss(self._raw(batch), (self._truth(batch) > 0).float())}

    def classify(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Of each voxel inside the halo its score, and the probability that it holds a galaxy, both
        ``(batch, 1, z, y, x)``."""
        logits = self._raw(batch)
        return self._score(logits), self._probability(logits)

    def predict(self, batch: Batch) -> dict[str, Tensor]:
        return {"galaxy_probability": self.classify(batch)[1]}

    def evaluate(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        logits, labels = self._raw(batch), self._truth(batch) > 0
        sums = {
            "voxels": torch.tensor(labels.numel()),
            "scores": score_counts(self._score(logits), labels),
        }
        if self.config.loss == "dice":  # of all voxels together, whatever the tiles
            sums["dice"] = dice_sums(logits, labels.float()).double().sum(0)
        else:
            sums["loss"] = self._loss(logits, labels.float()).double() * labels.numel()
        return sums, {"galaxy_probability": self._probability(logits)}

    def calibrate(self, sums: Mapping[str, Tensor]) -> None:
        histogram = ScoreHistogram(sums["scores"].numpy())
        self.threshold.fill_(histogram.threshold_for_recall(self.config.recall))
        if self.config.loss == "dice":
            self.line.copy_(torch.tensor(histogram.platt_line()))

    def summarize(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        loss = dice(sums["dice"]) if self.config.loss == "dice" else sums["loss"] / sums["voxels"]
        return {"loss": loss.item(), **classification(sums["scores"], self.threshold)}


@dataclass(frozen=True)
class _Estimate:
    """What a regressor makes of a batch; all tensors are ``(batch, ., z, y, x)`` without the halo."""

    raw: Tensor
    """Of the network."""
    score: Tensor
    """By which voxels are called occupied."""
    probability: Tensor
    """That the voxel holds a galaxy."""
    kept: Tensor
    """Whether the voxel may hold any."""


class VoxelRegressor(VoxelObjective):
    """Number of galaxies in the voxels that a trained classifier keeps; 0 elsewhere.

    The classifier is frozen and travels with the weights. With squared error the network gives means: the
    weight on voxels with galaxies is divided out again, with the classifier's probability
    (`galdist.training.losses.unweighted_mean`). With a likelihood it gives a distribution
    (`galdist.models.counts`), whose mean is predicted and which can be drawn from; then it may do without a
    classifier, and the probability of a galaxy is its own.
    """

    config: RegressorConfig
    threshold: Tensor
    """Where there is no classifier: the probability at which metrics call a voxel occupied."""

    def __init__(self, config: RegressorConfig, parts: Sequence[Objective] = ()) -> None:
        likelihood = config.likelihood
        super().__init__(config, 1 if likelihood is None else Counts.n_parameters(likelihood))
        self.config, self.likelihood = config, likelihood
        self.outputs = (Field(name=self.target), Field(name="galaxy_probability"))
        self.classifier: VoxelClassifier | None = None
        if not parts:
            self.register_buffer("threshold", torch.tensor(0.5))
            return
        assert isinstance(parts[0], VoxelClassifier)
        self.classifier = parts[0]
        self.build_on(self.classifier)

    def _start(self, fraction: float, mean: float) -> None:
        if self.likelihood is not None:
            self._start_head(Counts.start(self.likelihood, mean))

    def _estimate(self, batch: Batch) -> _Estimate:
        if self.classifier is not None:
            with torch.no_grad():
                score, probability = self.classifier.classify(batch)
            return _Estimate(self._raw(batch), score, probability, score >= self.classifier.threshold)
        raw = self._raw(batch)
        assert self.likelihood is not None
        occupied = Counts.of(raw, self.likelihood).occupied().float().clamp(0, 1)
        return _Estimate(raw, occupied, occupied, torch.ones_like(occupied, dtype=torch.bool))

    def _loss(self, estimate: _Estimate, counts: Tensor) -> Tensor:
        if self.likelihood is None:
            error = weighted_squared_error(F.softplus(estimate.raw), counts, self.config.nonempty_weight)
        else:
            error = -Counts.of(estimate.raw, self.likelihood).log_prob(counts).float()
        return (error * estimate.kept).mean() / self.nonempty_fraction

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return {"loss": self._loss(self._estimate(batch), self._truth(batch))}

    def _fields(self, estimate: _Estimate) -> dict[str, Tensor]:
        if self.likelihood is None:
            counts = unweighted_mean(
                F.softplus(estimate.raw), estimate.probability, self.config.nonempty_weight
            )
        else:
            counts = Counts.of(estimate.raw, self.likelihood).mean().float()
        return {self.target: counts * estimate.kept, "galaxy_probability": estimate.probability}

    def predict(self, batch: Batch) -> dict[str, Tensor]:
        return self._fields(self._estimate(batch))

    def draw(self, batch: Batch, uniforms: Tensor) -> dict[str, Tensor]:
        if self.likelihood is None:
            return super().draw(batch, uniforms)
        estimate = self._estimate(batch)
        counts = Counts.of(estimate.raw, self.likelihood).quantile(uniforms)
        return {self.target: counts * estimate.kept}

    def log_chances(self, batch: Batch, most: int) -> Tensor:
        """ln P(n) of n = 0 to ``most`` galaxies, of which there are no more: ``(batch, most + 1, z, y, x)``
        without the halo. For models with a likelihood."""
        assert self.likelihood is not None
        estimate = self._estimate(batch)
        log = Counts.of(estimate.raw, self.likelihood).log_probs(most)
        none = torch.full_like(log, _IMPOSSIBLE)
        none[:, 0] = 0
        return torch.where(estimate.kept, log, none).log_softmax(1).float()

    def evaluate(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        estimate = self._estimate(batch)
        truth = self._truth(batch)
        fields = self._fields(estimate)
        n, m = truth.double(), fields[self.target].double()
        sums = {
            "loss": self._loss(estimate, truth).double() * truth.numel(),
            "voxels": torch.tensor(truth.numel()),
            "scores": score_counts(estimate.score, truth > 0),
            "moments": torch.stack([n.sum(), m.sum(), n.square().sum(), m.square().sum(), (n * m).sum()]),
        }
        return sums, fields

    def calibrate(self, sums: Mapping[str, Tensor]) -> None:
        if self.classifier is None:
            histogram = ScoreHistogram(sums["scores"].numpy())
            self.threshold.fill_(histogram.threshold_for_recall(self.config.recall))

    def summarize(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        voxels = sums["voxels"].item()
        n, m, nn_, mm, nm = (sums["moments"] / voxels).tolist()
        # a constant field has no variance, which rounding may take below zero
        spread = max((nn_ - n * n) * (mm - m * m), 0.0) ** 0.5
        threshold = self.threshold if self.classifier is None else self.classifier.threshold
        return {
            "loss": sums["loss"].item() / voxels,
            **classification(sums["scores"], threshold),
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
