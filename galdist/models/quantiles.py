"""Quantile regressions: networks that give quantiles of p(galaxy properties | halo).

- `src`: three quantiles, each with its own pinball loss, summed.
- `sqr`: one network for all levels (Tagasovska & Lopez-Paz 2019, arXiv:1811.00908), for one target or for
  several at a shared level.
- `autoregressive-sqr`: all levels of each target given the halo and the targets before it, so that a level
  of its own for each target makes joint draws (Si, Bishop & Kuleshov 2022, arXiv:2112.04643).

The first two are the models of Oyarzun & Espinoza.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field as Constraint
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn
from zuko.nn import MLP
from zuko.transforms import MonotonicRQSTransform

from galdist.config import StrictModel
from galdist.models import Batch, ModelConfig, Objective, TrainingFields
from galdist.models.densities import Gaussianization
from galdist.models.tables import TableConfig, TableObjective, Widths
from galdist.training.losses import pinball


class SumOfQuantilesConfig(TableConfig):
    """The lower quartile, median and upper quartile; the hidden layers are the published ones."""

    name: Literal["src"] = "src"
    hidden: Widths = (100, 100)
    """Widths of the hidden layers."""


class WassersteinConfig(StrictModel):
    """Squared 2-Wasserstein distance between a batch's predicted and true targets (standardized)."""

    weight: PositiveFloat
    """Factor of the distance in the loss; the pinball loss has 1."""
    kind: Literal["sliced", "exact"] = "sliced"
    """sliced: mean over random directions (Bonneel et al. 2015); exact: optimal transport by network simplex,
    whose time grows as the cube of `rows`."""
    directions: PositiveInt = 50
    """Of the sliced distance."""
    rows: PositiveInt = 256
    """Rows between which one distance is taken; a batch has several. Where each rank's share of a batch is a
    multiple of it, the number of ranks does not change the loss (but for the levels and directions drawn)."""


class SimultaneousConfig(TableConfig):
    """All levels by one network; the hidden layers are the published ones."""

    name: Literal["sqr"] = "sqr"
    hidden: Widths = (64, 64)
    """Widths of the hidden layers, each with layer normalization."""
    wasserstein: WassersteinConfig | None = None
    """Penalty on the distribution of a batch; none by default."""


class AutoregressiveConfig(TableConfig):
    """Monotone splines in the level, for one target after another in the order of `targets`."""

    name: Literal["autoregressive-sqr"] = "autoregressive-sqr"
    width: PositiveInt = 128
    """Of the hidden layers of each target's network."""
    blocks: PositiveInt = 2
    """Residual blocks of each target's network, of two layers each."""
    bins: Annotated[int, Constraint(ge=2)] = 16
    """Bins of each spline."""
    knots: Annotated[int, Constraint(ge=2)] = 512
    """Knots of the map that makes each target a standard Gaussian over the training rows. Gaps in a target's
    distribution are kept as far as they lie between two of them."""
    levels: PositiveInt = 8
    """Levels at which a training row's loss is taken, one at random in each of as many equal intervals."""


class SumOfQuantiles(TableObjective):
    """SRC: the quartiles of each target, from raw inputs, in the columns' own units.

    `point` is the median. Three quantiles are no distribution: `sample` repeats the median, which is what the
    published spectra and distances are of, so its draws have no scatter. `quantiles` knows the three levels
    only.
    """

    LEVELS = (0.25, 0.5, 0.75)
    Config: ClassVar[type[ModelConfig]] = SumOfQuantilesConfig
    config: SumOfQuantilesConfig

    def __init__(self, config: SumOfQuantilesConfig, parts: Sequence[Objective] = ()) -> None:
        super().__init__(config, parts)
        self.network = MLP(len(self.inputs), len(self.targets) * len(self.LEVELS), config.hidden)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return {"loss": self.validation_loss(batch).mean()}

    def validation_loss(self, batch: Batch) -> Tensor:
        """Sum of the pinball losses of all quantiles [own units], (b,)."""
        predicted = self._quartiles(batch)
        levels = torch.tensor(self.LEVELS, device=predicted.device)[:, None]
        return pinball(predicted, batch["targets"][:, None], levels).sum((1, 2))

    def point(self, batch: Batch) -> Tensor:
        """Median, (b, t)."""
        return self._quartiles(batch)[:, self.LEVELS.index(0.5)]

    def sample(self, batch: Batch, n: int, generator: torch.Generator) -> Tensor:
        """The median ``n`` times, (b, n, t)."""
        del generator
        return self.point(batch)[:, None].repeat(1, n, 1)

    def quantiles(self, batch: Batch, levels: Tensor) -> Tensor | None:
        """Quantiles (b, q, t) at ``levels`` (q,); None where one of these is not .25, .5 or .75."""
        known = torch.tensor(self.LEVELS, device=levels.device)
        same = (levels[:, None] - known).abs() < 1e-6
        if not same.any(1).all():
            return None
        return self._quartiles(batch)[:, same.int().argmax(1)]

    def _quartiles(self, batch: Batch) -> Tensor:
        """(b, 3, t), own units."""
        output: Tensor = self.network(batch["inputs"]).float()
        return output.unflatten(1, (len(self.targets), len(self.LEVELS))).mT


class SimultaneousQuantiles(TableObjective):
    """SQR: one network for all levels, which are drawn at random for each row in training.

    All targets have the same level. A draw takes each of them at it, so that two targets that the halo does
    not decide are as tightly related as they can be, whatever the truth: rank correlation 1 where both rise.

    `point` is the value at level .5. Values published as this model's errors are of one draw, not of it.
    """

    Config: ClassVar[type[ModelConfig]] = SimultaneousConfig
    config: SimultaneousConfig

    def __init__(self, config: SimultaneousConfig, parts: Sequence[Objective] = ()) -> None:
        super().__init__(config, parts)
        widths = (len(self.inputs) + 1, *config.hidden)
        layers = (
            module for a, b in pairwise(widths) for module in (nn.Linear(a, b), nn.LayerNorm(b), nn.ReLU())
        )
        self.network = nn.Sequential(*layers, nn.Linear(widths[-1], len(self.targets)))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        inputs, true = self.scaled_inputs(batch), self.scaled_targets(batch)
        levels = torch.rand(len(inputs), 1, device=inputs.device)
        predicted = self._at(inputs, levels)
        loss = pinball(predicted, true, levels).mean()
        if self.config.wasserstein is None:
            return {"loss": loss}
        distance = _wasserstein(predicted, true, self.config.wasserstein)
        return {
            "loss": loss + self.config.wasserstein.weight * distance,
            "pinball": loss,
            "wasserstein": distance,
        }

    def validation_loss(self, batch: Batch) -> Tensor:
        """Pinball loss of the standardized targets, mean over them and over 32 levels, (b,)."""
        levels = _midpoints(32, self.input_mean.device)
        return pinball(
            self._at_all(batch, levels), self.scaled_targets(batch)[:, None], levels[:, None]
        ).mean((1, 2))

    def point(self, batch: Batch) -> Tensor:
        """Median, (b, t)."""
        inputs = self.scaled_inputs(batch)
        return self.unscaled(self._at(inputs, torch.full_like(inputs[:, :1], 0.5)))

    def sample(self, batch: Batch, n: int, generator: torch.Generator) -> Tensor:
        inputs = self.scaled_inputs(batch)
        levels = torch.rand(len(inputs), n, 1, generator=generator, device=inputs.device)
        return self.unscaled(self._at(inputs[:, None].expand(-1, n, -1), levels))

    def quantiles(self, batch: Batch, levels: Tensor) -> Tensor:
        """Quantiles (b, q, t) of what `sample` draws, at ``levels`` (q,).

        Where the network's quantiles cross they are rearranged (Chernozhukov, Fernandez-Val & Galichon 2010,
        Econometrica 78, 1093), on a grid of levels, between which they are interpolated linearly.
        """
        rising = self._at_all(batch, torch.linspace(0, 1, _GRID + 1, device=levels.device)).sort(1).values
        below = (levels * _GRID).long().clamp(max=_GRID - 1)
        between = (levels * _GRID - below)[:, None]
        return self.unscaled(torch.lerp(rising[:, below], rising[:, below + 1], between))

    def _at(self, inputs: Tensor, levels: Tensor) -> Tensor:
        """Standardized targets (..., t) at ``levels`` (..., 1) for standardized ``inputs`` (..., d)."""
        output: Tensor = self.network(torch.cat([inputs, (levels - 0.5) * _LEVEL_RANGE], -1)).float()
        return output

    def _at_all(self, batch: Batch, levels: Tensor) -> Tensor:
        """Standardized targets (b, q, t) at each of ``levels`` (q,)."""
        inputs = self.scaled_inputs(batch)[:, None].expand(-1, len(levels), -1)
        return self._at(inputs, levels[:, None].expand(len(inputs), -1, -1))


_LEVEL_RANGE = 12.0  # that the level has as an input, around 0: as published
_GRID = 128  # intervals of levels; its points include the quartiles


def _wasserstein(predicted: Tensor, true: Tensor, config: WassersteinConfig) -> Tensor:
    """Squared 2-Wasserstein distance between rows ``predicted`` and ``true`` (b, t), mean over groups of rows
    (and over directions)."""
    import ot

    total = torch.zeros((), device=true.device)
    for ours, theirs in zip(predicted.split(config.rows), true.split(config.rows), strict=True):
        if config.kind == "sliced":
            directions = nn.functional.normalize(
                torch.randn(ours.shape[1], config.directions, device=ours.device), dim=0
            )
            distance = ot.sliced_wasserstein_distance(ours, theirs, projections=directions).square()
        else:
            mass = ours.new_full((len(ours),), 1 / len(ours))
            distance = ot.emd2(mass, mass, ot.dist(ours, theirs))
        total = total + distance * (len(ours) / len(true))
    return total


class AutoregressiveQuantiles(TableObjective):
    """All quantiles of each target given the halo and the targets before it, in the order of `targets`.

    Each target is mapped to a Gaussian over the training rows, which sends edges (a cut in stellar mass) to
    infinity and closes gaps. For this z a network gives Q(level) = a + b S(Phi^-1(level)), S a monotone
    rational-quadratic spline (Durkan et al. 2019, arXiv:1906.04032): quantiles never cross, and one pass of
    the network serves all levels. It learns by the pinball loss at many levels, given the true values of the
    targets before. The loss is the sum over targets of the continuous ranked probability scores of z, which
    only the true joint distribution minimizes. Draws stay within the training range of each target.

    `point` is the median. `quantiles` are marginal: exact for the first target; for the others those of the
    mixture over 128 quasi-random draws of the targets before (over 32 in `point`, 4 in the errors of
    `evaluate`).
    """

    Config: ClassVar[type[ModelConfig]] = AutoregressiveConfig
    config: AutoregressiveConfig
    _paths: Tensor

    def __init__(
        self, config: AutoregressiveConfig, parts: Sequence[Objective] = (), n_embedded: int = 0
    ) -> None:
        """``n_embedded``: numbers that a subclass's `known` adds to the inputs."""
        super().__init__(config, parts)
        t = len(self.targets)
        self.gaussianization = Gaussianization(t, config.knots)
        self.networks = nn.ModuleList(
            _SplineNetwork(len(self.inputs) + n_embedded + before, config.width, config.blocks, config.bins)
            for before in range(t)
        )
        sobol = torch.quasirandom.SobolEngine(t, scramble=True, seed=0)
        self.register_buffer("_paths", sobol.draw(_PATHS), persistent=False)

    def prepare(self, training: TrainingFields) -> None:
        super().prepare(training)
        self.gaussianization.fit(self.scaled_training_targets(training))

    def known(self, batch: Batch) -> Tensor:
        """What is known of each halo, (b, k): its standardized inputs, and what a subclass adds."""
        return self.scaled_inputs(batch)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        n, t = self.config.levels, len(self.targets)
        device = batch["inputs"].device
        levels = (torch.arange(n, device=device) + torch.rand(t, len(batch["inputs"]), n, device=device)) / n
        return {"loss": self._score(batch, levels).mean()}

    def validation_loss(self, batch: Batch) -> Tensor:
        """Sum over targets of the continuous ranked probability scores of z, from 32 levels, (b,)."""
        levels = _midpoints(32, batch["inputs"].device)
        return self._score(batch, levels.expand(len(self.targets), len(batch["inputs"]), -1))

    def point(self, batch: Batch) -> Tensor:
        """Median, (b, t)."""
        return self._median(batch, _POINT_PATHS)

    def sample(self, batch: Batch, n: int, generator: torch.Generator) -> Tensor:
        inputs = batch["inputs"]
        levels = torch.rand(len(inputs), n, len(self.targets), generator=generator, device=inputs.device)
        return self._own_units(self._draw(self.known(batch), levels))

    def quantiles(self, batch: Batch, levels: Tensor) -> Tensor:
        """Marginal quantiles (b, q, t) at ``levels`` (q,); after the first target from 1024 values a row."""
        return self._marginals(batch, levels, self._paths)

    def evaluate(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        error = self._median(batch, _EVALUATION_PATHS).double() - batch["targets"].double()
        sums = {
            "loss": self.validation_loss(batch).double().sum(),
            "rows": torch.tensor(len(error)),
            "squares": error.square().sum(0),
        }
        return sums, {}

    def _score(self, batch: Batch, levels: Tensor) -> Tensor:
        """Sum over targets of twice the mean pinball loss of z at ``levels`` (t, b, n), (b,)."""
        z = self.gaussianization(self.scaled_targets(batch))[0]
        of_halo = self.known(batch)
        known = torch.cat([of_halo, z], -1)
        score = z.new_zeros(len(z))
        for target, (network, at) in enumerate(zip(self.networks, levels, strict=True)):
            predicted = network(known[:, : of_halo.shape[1] + target], at)
            score = score + 2 * pinball(predicted, z[:, target, None], at).mean(1)
        return score

    def _draw(self, of_halo: Tensor, levels: Tensor) -> Tensor:
        """z (b, n, k) of the first k targets at ``levels`` (b, n, k), one after another, for what is
        `known` of the halos (b, d)."""
        b, n, k = levels.shape
        low, high = self._range()
        known = of_halo[:, None]  # the first target has the same quantiles in all draws
        drawn: list[Tensor] = []
        for target in range(k):
            at = levels[..., target]
            rows = known.flatten(0, 1)
            z = self.networks[target](rows, at.reshape(len(rows), -1)).view(b, n)
            drawn.append(z.clamp(low[target], high[target]))
            known = torch.cat([of_halo[:, None].expand(-1, n, -1), torch.stack(drawn, -1)], -1)
        return torch.stack(drawn, -1) if drawn else of_halo.new_zeros(b, n, 0)

    def _median(self, batch: Batch, paths: int) -> Tensor:
        return self._marginals(batch, torch.tensor([0.5], device=self._paths.device), self._paths[:paths])[
            :, 0
        ]

    def _marginals(self, batch: Batch, levels: Tensor, paths: Tensor) -> Tensor:
        """Marginal quantiles (b, q, t) at ``levels`` (q,), own units, over draws at ``paths`` (s, t)."""
        parts = self.known(batch).split(_ROWS // len(paths))
        z = torch.cat([self._marginals_of_z(of_halo, levels, paths) for of_halo in parts])
        return self._own_units(z.clamp(*self._range()))

    def _marginals_of_z(self, of_halo: Tensor, levels: Tensor, paths: Tensor) -> Tensor:
        b, (s, t) = len(of_halo), paths.shape
        marginals = [self.networks[0](of_halo, levels.expand(b, -1))]
        before = self._draw(of_halo, paths[:, : t - 1].expand(b, -1, -1))
        for target in range(1, t):
            known = torch.cat([of_halo[:, None].expand(-1, s, -1), before[..., :target]], -1).flatten(0, 1)
            # Every path its own levels: together they are spread as evenly as one draw's of many.
            each = torch.arange(_PATH_LEVELS, device=of_halo.device)
            at = (each + paths[:, target, None]) / _PATH_LEVELS
            pooled = self.networks[target](known, at.repeat(b, 1)).view(b, -1)
            marginals.append(torch.quantile(pooled, levels, dim=1).T)
        return torch.stack(marginals, -1)

    def _range(self) -> Tensor:
        """z (2, t) of the ends of the training range."""
        ends = torch.stack([self.target_low, self.target_high])
        z: Tensor = self.gaussianization(self.scaled_targets({"targets": ends}))[0]
        return z

    def _own_units(self, z: Tensor) -> Tensor:
        y = self.unscaled(self.gaussianization.inverse(z))
        return y.clamp(self.target_low, self.target_high)  # rounding


_PATHS = 128  # draws of the targets before one, over which its marginal is taken
_POINT_PATHS = 32  # of them, for medians
_EVALUATION_PATHS = 4
_PATH_LEVELS = 8  # values at each of them
_ROWS = 16384  # that go through a network at a time: their activations stay in the cache


class _SplineNetwork(nn.Module):
    """Quantiles of z, from what is known: a residual network gives a monotone spline for each row."""

    def __init__(self, n_in: int, width: int, blocks: int, bins: int) -> None:
        super().__init__()
        self._sizes = (bins, bins, bins - 1, 1, 1)
        head = nn.Linear(width, sum(self._sizes))
        nn.init.zeros_(head.weight)  # starts as the standard Gaussian that z is over all rows
        nn.init.zeros_(head.bias)
        residual = (_ResidualBlock(width) for _ in range(blocks))
        self.network = nn.Sequential(nn.Linear(n_in, width), *residual, nn.LayerNorm(width), nn.SiLU(), head)

    def forward(self, known: Tensor, levels: Tensor) -> Tensor:
        """z (m, q) at ``levels`` (m, q) for rows ``known`` (m, n_in)."""
        widths, heights, slopes, center, log_scale = self.network(known).float().split(self._sizes, -1)
        spline = _RowSplines(widths, heights, slopes, bound=_BOUND)
        normal = torch.special.ndtri(levels.clamp(_LOWEST_LEVEL, 1 - _LOWEST_LEVEL))
        z: Tensor = center + log_scale.exp() * spline(normal)
        return z


class _RowSplines(MonotonicRQSTransform):
    """Splines with parameters (m, bins), each of values (m, q).

    zuko's own would repeat the parameters q times, and take most of a training step for it.
    """

    @staticmethod
    def searchsorted(seq: Tensor, value: Tensor) -> Tensor:
        return torch.searchsorted(seq, value)

    def bin(self, k: Tensor) -> tuple[Tensor, ...]:
        inside = (k >= 0) & (k < self.bins)
        k = k % self.bins
        knots = (self.horizontal, self.vertical, self.derivatives)
        x0, x1, y0, y1, d0, d1 = (values.gather(-1, at) for values in knots for at in (k, k + 1))
        return inside, x0, x1, y0, y1, d0, d1, (y1 - y0) / (x1 - x0)


class _ResidualBlock(nn.Module):
    """x + W silu(V norm(x)), at first x alone."""

    def __init__(self, width: int) -> None:
        super().__init__()
        last = nn.Linear(width, width)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.layers = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), last)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.layers(x)
        return y


_BOUND = 5.0  # of the splines' argument, in standard deviations; further out they are straight
_LOWEST_LEVEL = 2.0**-24  # steps of random float32 levels


def _midpoints(n: int, device: torch.device) -> Tensor:
    """Levels in the middles of ``n`` equal intervals, (n,)."""
    return (torch.arange(n, device=device) + 0.5) / n
