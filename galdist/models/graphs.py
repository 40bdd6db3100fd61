"""Graph networks over halos and their neighbors.

- `graph-sqr`: a message from every halo within a linking length, pooled in several ways, tells the
  autoregressive quantiles of a halo's galaxy what its surroundings are. The graph is that of Wu & Jespersen
  (2023, arXiv:2306.12327), who predict one value of the stellar mass from it.
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn
from torch_geometric.nn.aggr import MultiAggregation

from galdist.catalogs.neighbors import Neighborhood
from galdist.models import Batch, ModelConfig, Objective
from galdist.models.quantiles import AutoregressiveConfig, AutoregressiveQuantiles

_AGGREGATIONS = ("sum", "mean", "max", "std")


class GraphConfig(AutoregressiveConfig):
    """Messages from neighbors, and the quantile functions that stand behind them."""

    name: Literal["graph-sqr"] = "graph-sqr"  # type: ignore[assignment]
    neighbors: Neighborhood = Neighborhood()
    """Halos of the table, of all splits: they have inputs only. The table needs positions."""
    message: PositiveInt = 64
    """Width of a message, and of the network that makes it."""
    embedding: PositiveInt = 32
    """Numbers that describe a halo's surroundings."""


class GraphQuantiles(AutoregressiveQuantiles):
    """Autoregressive quantiles given the halo and its neighbors.

    An edge knows the inputs of both halos, standardized, and their distance, so that nothing depends on the
    orientation of the box. Positions and velocities by themselves are not seen. A halo without neighbors
    receives nothing: zeros.
    """

    Config: ClassVar[type[ModelConfig]] = GraphConfig
    config: GraphConfig

    def __init__(self, config: GraphConfig, parts: Sequence[Objective] = ()) -> None:
        super().__init__(config, parts, config.embedding)
        self.neighborhood = config.neighbors
        self.surroundings = _Surroundings(len(self.inputs), config.message, config.embedding)

    def known(self, batch: Batch) -> Tensor:
        halos = self.scaled_inputs(batch)
        neighbors = (batch["neighbors"] - self.input_mean) / self.input_std
        distance = batch["distance"] / self.config.neighbors.linking_length
        return torch.cat([halos, self.surroundings(halos, neighbors, distance, batch["receiver"])], -1)


class _Surroundings(nn.Module):
    """One step of message passing, to halos from their neighbors."""

    def __init__(self, n_inputs: int, width: int, n_out: int) -> None:
        super().__init__()
        self.message = nn.Sequential(
            nn.Linear(2 * n_inputs + 1, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        )
        self.aggregate = MultiAggregation(list(_AGGREGATIONS))
        self.update = nn.Sequential(
            nn.Linear(n_inputs + len(_AGGREGATIONS) * width, width), nn.SiLU(), nn.Linear(width, n_out)
        )

    def forward(self, halos: Tensor, neighbors: Tensor, distance: Tensor, receiver: Tensor) -> Tensor:
        """(b, n_out), for ``halos`` (b, d) with ``neighbors`` (e, d) at ``distance`` (e,)."""
        edges = torch.cat([halos[receiver], neighbors, distance[:, None]], -1)
        pooled = self.aggregate(self.message(edges), receiver, dim_size=len(halos))
        embedded: Tensor = self.update(torch.cat([halos, pooled], -1))
        return embedded
