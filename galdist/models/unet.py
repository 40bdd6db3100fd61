"""The network of a diffusion model: a U-Net of two or three dimensions that knows how much noise there is.

Like all networks here it is local (`galdist.models.layers`): kernels are standardized where Ono et al. 2024
(arXiv:2403.10648) normalize groups of activations over the mesh, and attention, at the coarsest level, looks
at neighbors where theirs looks at the whole mesh. So tiles are exact, and a network trained on crops sees in
a larger box what it was trained on.
"""

import itertools
import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from galdist.models.conditioning import Embedding, Modulation
from galdist.models.layers import BlockNetwork, standardized, wrap

# Brings the variance of the SiLU of a unit Gaussian back to one.
_SILU_GAIN = 1.788
_FREQUENCIES = 32  # of waves in gamma
_HEAD = 32  # channels of a head of attention

_CONVOLVE = {2: F.conv2d, 3: F.conv3d}
_EXPAND = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_REDUCE: dict[int, type[nn.Conv2d | nn.Conv3d]] = {2: nn.Conv2d, 3: nn.Conv3d}
_CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}


class Conv(nn.Module):
    """SiLU, then a convolution of a standardized 3^d kernel."""

    def __init__(self, n_in: int, n_out: int, spatial: int) -> None:
        super().__init__()
        self.spatial = spatial
        self.weight = nn.Parameter(torch.randn(n_out, n_in, *(3,) * spatial))
        self.gain = nn.Parameter(torch.ones(n_out))
        self.bias = nn.Parameter(torch.zeros(n_out))

    def forward(self, x: Tensor, periodic: bool) -> Tensor:
        kernel, x = _SILU_GAIN * standardized(self.weight, self.gain), F.silu(x)
        if periodic:
            return _CONVOLVE[self.spatial](wrap(x, 1, self.spatial), kernel, self.bias)
        return _CONVOLVE[self.spatial](x, kernel, self.bias, padding=1)


class Block(nn.Module):
    """Two convolutions, modulated between them by the features of a sample, and a skip connection around
    all."""

    reach = 2

    def __init__(self, n_in: int, n_out: int, features: int, spatial: int) -> None:
        super().__init__()
        self.project = nn.Identity() if n_in == n_out else _REDUCE[spatial](n_in, n_out, 1)
        self.first = Conv(n_in, n_out, spatial)
        self.modulate = Modulation(features, n_out)
        self.second = Conv(n_out, n_out, spatial)
        self.strength = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor, features: Tensor, periodic: bool) -> Tensor:
        y = self.second(self.modulate(self.first(x, periodic), features), periodic)
        return torch.addcmul(self.project(x), y, self.strength.to(y.dtype))


class NeighborAttention(nn.Module):
    """Each cell attends to those at most ``reach`` cells away along every axis (Hassani et al. 2023,
    arXiv:2204.07143), with a learned preference for each offset. Beyond the faces of a mesh that is not
    periodic there is nothing to attend to.
    """

    def __init__(self, channels: int, reach: int, spatial: int) -> None:
        super().__init__()
        self.reach, self.spatial = reach, spatial
        self.heads = max(channels // _HEAD, 1)
        if channels % self.heads:
            raise ValueError(f"attention takes multiples of {_HEAD} channels, or fewer; not {channels}")
        conv = _REDUCE[spatial]
        self.project = conv(channels, 3 * channels, 1)
        self.preference = nn.Parameter(torch.zeros(self.heads, (2 * reach + 1) ** spatial))
        self.output = conv(channels, channels, 1)
        self.strength = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor, periodic: bool) -> Tensor:
        n, _, *mesh = x.shape
        width = self.reach
        query, key, value = self.project(x).view(n, 3, self.heads, -1, *mesh).unbind(1)
        # The cosine of the angle between them, for nothing else bounds what they are.
        query = F.normalize(query, dim=2) * query.shape[2] ** 0.5
        key = F.normalize(key, dim=2)
        there = torch.ones(mesh, dtype=torch.bool, device=x.device)
        if periodic:
            key, value = wrap(key, width, self.spatial), wrap(value, width, self.spatial)
            there = wrap(there, width, self.spatial)
        else:
            pads = (width,) * (2 * self.spatial)
            key, value, there = F.pad(key, pads), F.pad(value, pads), F.pad(there, pads)
        neighbors = [
            tuple(slice(start, start + cells) for start, cells in zip(origin, mesh, strict=True))
            for origin in itertools.product(range(2 * width + 1), repeat=self.spatial)
        ]
        every, scores = (slice(None),) * 3, []
        for place, preference in zip(neighbors, self.preference.unbind(1), strict=True):
            score = (query * key[*every, *place]).sum(2) + preference.view(-1, *(1,) * self.spatial)
            scores.append(score.masked_fill(~there[place], -math.inf))
        weights = torch.stack(scores).softmax(0)
        attended = torch.zeros_like(query)
        for place, weight in zip(neighbors, weights, strict=True):
            attended = attended + weight[:, :, None] * value[*every, *place]
        return torch.addcmul(x, self.output(attended.flatten(1, 2)), self.strength.to(x.dtype))


class Features(nn.Module):
    """What is known of a sample, as ``width`` features: its noise, and the parameters of its simulation.

    Parameters
    ----------
    gamma
        the range of gamma that is expected.
    parameters
        their names. Where the values are not known, a learned vector stands for them.
    """

    frequencies: Tensor

    def __init__(self, gamma: tuple[float, float], parameters: Sequence[str], width: int) -> None:
        super().__init__()
        # From half a wave over the range to one over half a unit of gamma.
        span = gamma[1] - gamma[0]
        frequencies = torch.logspace(math.log10(math.pi / span), math.log10(4 * math.pi), _FREQUENCIES)
        self.register_buffer("frequencies", frequencies)
        self.noise = nn.Sequential(
            nn.Linear(2 * _FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        )
        self.embedding = Embedding(parameters, width) if parameters else None
        self.unknown = nn.Parameter(torch.zeros(width)) if parameters else None

    def forward(self, gamma: Tensor, parameters: Tensor | None, known: Tensor | None = None) -> Tensor:
        """``gamma`` (b,); ``parameters`` (b, p), or None where none are known; ``known`` (b,), whether they
        are, by default all -> (b, width)."""
        waves = gamma[:, None] * self.frequencies
        features: Tensor = self.noise(torch.cat([waves.sin(), waves.cos()], 1))
        if self.embedding is None or self.unknown is None:
            return features
        if parameters is None:
            return features + self.unknown
        embedded = self.embedding(parameters)
        if known is not None:
            embedded = torch.where(known[:, None], embedded, self.unknown.to(embedded.dtype))
        return features + embedded


class UNet(BlockNetwork):
    """U-Net with a block a level going down and another going up, skips between them, and attention at the
    coarsest level.

    Parameters
    ----------
    n_in, n_out
        channels of the mesh that comes in, and of the one that goes out.
    channels
        channels of each level; each level has half the cells a side of the one before.
    spatial
        dimensions of the mesh, 2 or 3.
    features
        of a sample: `Features`.
    attention
        cells of the coarsest level to each side that a cell attends to; 0 is without attention.
    """

    def __init__(
        self, n_in: int, n_out: int, channels: Sequence[int], spatial: int, features: int, attention: int
    ) -> None:
        super().__init__()
        self.spatial = spatial
        conv, pairs = _REDUCE[spatial], list(pairwise(channels))
        self.enter = conv(n_in, channels[0], 1)
        self.down = nn.ModuleList(Block(n, n, features, spatial) for n in channels)
        self.reduce = nn.ModuleList(conv(fine, coarse, 2, stride=2) for fine, coarse in pairs)
        self.attention = NeighborAttention(channels[-1], attention, spatial) if attention else None
        self.middle = Block(channels[-1], channels[-1], features, spatial)
        self.expand = nn.ModuleList(_EXPAND[spatial](coarse, fine, 2, stride=2) for fine, coarse in pairs)
        self.up = nn.ModuleList(Block(2 * fine, fine, features, spatial) for fine, _ in pairs)
        self.head = nn.Linear(channels[0], n_out)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.alignment = 2 ** len(pairs)
        reach = 2 * Block.reach + attention
        for _ in pairs:
            # A coarse cell is two fine ones, and the output may lie in either.
            reach = 2 * Block.reach + 2 * reach + 1
        self.reach = reach
        """Cells from an output to the furthest input that it depends on."""

    def forward(self, x: Tensor, features: Tensor, periodic: bool) -> Tensor:
        """``(b, n_in, *mesh)`` and ``(b, features)`` -> ``(b, n_out, *mesh)``, float32 whatever the autocast.

        Beyond its faces the mesh continues with itself where it is ``periodic``, else with zeros. The output
        of an untrained network is zero.
        """
        # Channels last is twice as fast on CPUs; a mesh of one channel does not say which order it has.
        x = self.enter(x).contiguous(memory_format=_CHANNELS_LAST[self.spatial])
        skips: list[Tensor] = []
        for level, block in enumerate(self.down):
            if level:
                x = self.reduce[level - 1](x)
            x = self.run(block, x, features, periodic)
            skips.append(x)
        x = skips.pop()
        if self.attention is not None:
            x = self.run(self.attention, x, periodic)
        x = self.run(self.middle, x, features, periodic)
        for expand, block in zip(reversed(self.expand), reversed(self.up), strict=True):
            x = self.run(block, torch.cat([expand(x), skips.pop()], 1), features, periodic)
        with torch.autocast(x.device.type, enabled=False):
            # As a linear map of the last axis it keeps the memory order of its input, in its gradient too.
            output: Tensor = self.head(x.movedim(1, -1).to(self.head.weight.dtype)).movedim(-1, 1)
            return output
