"""Densities: networks that give the parameters of p(galaxy properties | halo).

`nn-gauss` gives a Gaussian's mean and covariance, `flow` a normalizing flow; both as in Rodrigues et al. 2025
(A&A 698, A3), who found flows the best of their models. Both are trained by maximum likelihood; their loss is
-ln p in the columns' own units, so that losses of one table can be compared.
"""

import abc
import math
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
import zuko
from numpy.typing import NDArray
from pydantic import Field as Constraint
from pydantic import PositiveInt
from scipy.special import ndtr, ndtri
from torch import Tensor, nn

from galdist.models import Batch, ModelConfig, Objective, TrainingFields
from galdist.models.tables import TableConfig, TableObjective, Widths

_LOWEST_SCALE = 1e-3  # of a Gaussian, standardized


class GaussConfig(TableConfig):
    """Gaussian with full covariance; the hidden layers are those that A&A 698, A3 ended with."""

    name: Literal["nn-gauss"] = "nn-gauss"
    hidden: Widths = (134, 494, 256, 456, 380)
    """Widths of the hidden layers."""


class FlowConfig(TableConfig):
    """Conditional neural spline autoregressive flow (Durkan et al. 2019, arXiv:1906.04032)."""

    name: Literal["flow"] = "flow"
    transforms: PositiveInt = 2
    """Autoregressive transforms, one after another; the order of the targets is turned around between two."""
    hidden: Widths = (128, 128)
    """Widths of the hidden layers of each transform's network."""
    bins: Annotated[int, Constraint(ge=2)] = 8
    """Bins of each spline."""
    knots: Annotated[int, Constraint(ge=2)] = 128
    """Knots of the map that makes each target a standard Gaussian over the training rows: few smear gaps
    between kinds of galaxies, many have slopes that are the scatter of few rows."""


class _Density(TableObjective):
    """A density of the standardized targets, trained by maximum likelihood."""

    @abc.abstractmethod
    def log_density(self, batch: Batch) -> Tensor:
        """ln p(targets | halo), (b,), per product of the targets' units."""

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return {"loss": -self.log_density(batch).mean()}

    def validation_loss(self, batch: Batch) -> Tensor:
        """-ln p(targets | halo) [nats], (b,)."""
        return -self.log_density(batch)


class GaussRegressor(_Density):
    """A Gaussian with full covariance for each halo. `point` is its mean."""

    Config: ClassVar[type[ModelConfig]] = GaussConfig
    config: GaussConfig

    def __init__(self, config: GaussConfig, parts: Sequence[Objective] = ()) -> None:
        super().__init__(config, parts)
        t = len(self.targets)
        self.network = zuko.nn.MLP(len(self.inputs), t + t * (t + 1) // 2, config.hidden)

    def gaussian(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean (b, t) and Cholesky factor of the covariance (b, t, t), standardized."""
        t = len(self.targets)
        output = self.network(self.scaled_inputs(batch)).float()
        mean, diagonal, below = output.split([t, t, t * (t - 1) // 2], -1)
        factor = torch.diag_embed(nn.functional.softplus(diagonal) + _LOWEST_SCALE)
        row, column = torch.tril_indices(t, t, -1, device=output.device)
        factor[:, row, column] = below
        return mean, factor

    def log_density(self, batch: Batch) -> Tensor:
        mean, factor = self.gaussian(batch)
        error = (self.scaled_targets(batch) - mean)[..., None]
        white = torch.linalg.solve_triangular(factor, error, upper=False)[..., 0]
        log_volume = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1) + self.target_std.log().sum()
        return -0.5 * white.square().sum(-1) - log_volume - 0.5 * len(self.targets) * math.log(2 * math.pi)

    def point(self, batch: Batch) -> Tensor:
        """Mean, (b, t)."""
        return self.unscaled(self.gaussian(batch)[0])

    def sample(self, batch: Batch, n: int, generator: torch.Generator) -> Tensor:
        mean, factor = self.gaussian(batch)
        noise = torch.randn(len(mean), n, mean.shape[1], generator=generator, device=mean.device)
        return self.unscaled(mean[:, None] + noise @ factor.mT)

    def quantiles(self, batch: Batch, levels: Tensor) -> Tensor:
        mean, factor = self.gaussian(batch)
        scale = factor.square().sum(-1).sqrt()
        z = torch.special.ndtri(levels)[:, None]
        return self.unscaled(mean[:, None] + z * scale[:, None])


class Gaussianization(nn.Module):
    """A monotone, piecewise linear map of each column to a standard Gaussian, with its inverse.

    Edges of a column's distribution, such as a cut in stellar mass, go to infinity: a density that is smooth
    there can be learned without spilling over them. Beyond the outermost knots the map is a straight line.
    """

    knots: Tensor
    """(k, t) quantiles of the columns."""
    levels: Tensor
    """(k,) the Gaussian's quantiles at the same levels."""

    def __init__(self, n_columns: int, n_knots: int) -> None:
        super().__init__()
        levels = torch.linspace(-1.0, 1.0, n_knots)
        self.register_buffer("levels", levels)
        self.register_buffer("knots", levels[:, None].repeat(1, n_columns))

    def fit(self, values: NDArray[Any]) -> None:
        """Take the knots from rows ``values`` (n, t)."""
        furthest = -float(ndtri(min(_TAIL / len(values), 0.25)))
        levels = np.linspace(-furthest, furthest, len(self.levels))
        knots = np.quantile(values, ndtr(levels), axis=0)
        # Where values repeat, quantiles do; a map that is to be inverted must rise.
        least = _LEAST_STEP * values.std(0) * np.arange(len(knots))[:, None]
        knots = np.maximum.accumulate(knots - least, 0) + least
        self.levels.copy_(torch.from_numpy(levels))
        self.knots.copy_(torch.from_numpy(knots))

    def forward(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Columns (..., t) -> Gaussian ones (..., t), and ln of the derivative (..., t)."""
        columns = [self._map(column, self.knots[:, i], self.levels) for i, column in enumerate(y.unbind(-1))]
        mapped, slopes = zip(*columns, strict=True)
        return torch.stack(mapped, -1), torch.stack(slopes, -1).log()

    def inverse(self, z: Tensor) -> Tensor:
        """Gaussian columns (..., t) -> the columns that map to them."""
        columns = [
            self._map(column, self.levels, self.knots[:, i])[0] for i, column in enumerate(z.unbind(-1))
        ]
        return torch.stack(columns, -1)

    @staticmethod
    def _map(x: Tensor, x_knots: Tensor, y_knots: Tensor) -> tuple[Tensor, Tensor]:
        slopes = y_knots.diff() / x_knots.diff()
        i = (torch.searchsorted(x_knots.contiguous(), x.contiguous()) - 1).clamp(0, len(slopes) - 1)
        return y_knots[i] + slopes[i] * (x - x_knots[i]), slopes[i]


_TAIL = 5  # training rows beyond the outermost knots: fewer would make steep or flat ends at random
_LEAST_STEP = 1e-5  # between knots, in standard deviations


class Flow(_Density):
    """A neural spline flow for each halo, after a map that makes each target Gaussian over the training rows.

    `point` is the mean over 64 draws, the same quasi-random ones for each row. The errors of `evaluate` are
    those of the mean too, from two draws whose scatter is subtracted.
    """

    Config: ClassVar[type[ModelConfig]] = FlowConfig
    config: FlowConfig
    _noise: Tensor

    def __init__(self, config: FlowConfig, parts: Sequence[Objective] = ()) -> None:
        super().__init__(config, parts)
        t = len(self.targets)
        self.gaussianization = Gaussianization(t, config.knots)
        self.flow = zuko.flows.NSF(
            t,
            len(self.inputs),
            transforms=config.transforms,
            bins=config.bins,
            hidden_features=config.hidden,
        )
        sobol = torch.quasirandom.SobolEngine(t, scramble=True, seed=0).draw(
            _POINT_DRAWS, dtype=torch.float64
        )
        self.register_buffer("_noise", torch.special.ndtri(sobol).float(), persistent=False)

    def prepare(self, training: TrainingFields) -> None:
        super().prepare(training)
        self.gaussianization.fit(self.scaled_training_targets(training))

    def log_density(self, batch: Batch) -> Tensor:
        z, log_slope = self.gaussianization(self.scaled_targets(batch))
        log_p: Tensor = self.flow(self.scaled_inputs(batch)).log_prob(z)
        return log_p + log_slope.sum(-1) - self.target_std.log().sum()

    def point(self, batch: Batch) -> Tensor:
        """Mean, (b, t)."""
        noise = self._noise.expand(len(batch["inputs"]), -1, -1)
        return self._draw(batch, noise).mean(1)

    def sample(self, batch: Batch, n: int, generator: torch.Generator) -> Tensor:
        inputs = batch["inputs"]
        noise = torch.randn(len(inputs), n, len(self.targets), generator=generator, device=inputs.device)
        return self._draw(batch, noise)

    def evaluate(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        generator = torch.Generator(batch["inputs"].device).manual_seed(0)
        draws = self.sample(batch, _EVALUATION_DRAWS, generator).double()
        error = draws.mean(1) - batch["targets"].double()
        squares = error.square() - draws.var(1) / _EVALUATION_DRAWS
        sums = {
            "loss": self.validation_loss(batch).double().sum(),
            "rows": torch.tensor(len(error)),
            "squares": squares.sum(0),
        }
        return sums, {}

    def _draw(self, batch: Batch, noise: Tensor) -> Tensor:
        """The targets (b, n, t) that the flow maps to Gaussian ``noise`` (b, n, t), own units."""
        n = noise.shape[1]
        rows = max(_ROWS // n, 1)
        parts = zip(self.scaled_inputs(batch).split(rows), noise.split(rows), strict=True)
        drawn = [self._inverse(context.repeat_interleave(n, 0), z.flatten(0, 1)) for context, z in parts]
        return self.unscaled(self.gaussianization.inverse(torch.cat(drawn))).view_as(noise)

    def _inverse(self, context: Tensor, z: Tensor) -> Tensor:
        """What the flow maps to ``z`` (m, t).

        Gives what zuko's own inverse gives, without parameters of targets other than the one that is next.
        """
        if len(self.targets) == 1:  # nothing to go through in order
            only: Tensor = self.flow(context).transform.inv(z)
            return only
        for transform in reversed(self.flow.transform.transforms):
            known = torch.zeros_like(z)
            *first, last = transform.hyper
            weight, bias = last.mask * last.weight, last.bias
            for target in transform.order.argsort().tolist():
                hidden = torch.cat([known, context], -1)
                for layer in first:
                    hidden = layer(hidden)
                rows = slice(target * transform.total, (target + 1) * transform.total)
                parameters = nn.functional.linear(hidden, weight[rows], bias[rows])
                spline = transform.univariate(*parameters.split([math.prod(s) for s in transform.shapes], -1))
                known[:, target] = spline.inv(z[:, target])
            z = known
        return z


_POINT_DRAWS = 64
_EVALUATION_DRAWS = 2
_ROWS = 16384  # draws made at a time: bounds what their activations take
