"""Layers that networks on periodic meshes share.

Every layer is local (an output depends on a bounded neighborhood, never on the mean of a mesh) and sees one
sample at a time. So a box predicted in tiles is the box predicted whole, and 2 ranks with half a batch each
train as 1 rank does. Batch normalization breaks both, group and instance normalization the first.
"""

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from galdist.models.conditioning import Modulation

# Brings the variance of a ReLU of a unit Gaussian back to one: Brock et al. 2021 (arXiv:2101.08692), section
# 2.
_RELU_GAIN = math.sqrt(2 / (1 - 1 / math.pi))


def wrap(x: Tensor, width: int, spatial: int = 3) -> Tensor:
    """``x`` of a periodic mesh (the last ``spatial`` axes), continued by ``width`` cells at each face."""
    for axis in range(-spatial, 0):
        n = x.shape[axis]
        x = torch.cat([x.narrow(axis, n - width, width), x, x.narrow(axis, 0, width)], axis)
    return x


def trim(x: Tensor, width: int, spatial: int = 3) -> Tensor:
    """``x`` without ``width`` cells at each face of its mesh, the last ``spatial`` axes."""
    for axis in range(-spatial, 0):
        x = x.narrow(axis, width, x.shape[axis] - 2 * width)
    return x


def standardized(weight: Tensor, gain: Tensor) -> Tensor:
    """Kernels of zero mean and of norm ``gain``, one for each output channel.

    Scaled weight standardization with gains, Brock et al. 2021 (arXiv:2101.08692), eq. 5, without the factor
    of the nonlinearity.
    """
    axes = tuple(range(1, weight.ndim))
    variance, mean = torch.var_mean(weight, axes, correction=0, keepdim=True)
    scale = gain.view(-1, *(1,) * len(axes)) * torch.rsqrt(variance * weight[0].numel() + 1e-6)
    return scale * (weight - mean)


class BlockNetwork(nn.Module):
    """A network of blocks, whose activations need not be kept for the gradient."""

    checkpoint_activations = False
    """Whether activations inside blocks are computed again for the gradient instead of being kept."""

    def run(self, block: nn.Module, *inputs: Any) -> Tensor:
        """``block(*inputs)``, of a block that draws no random numbers."""
        if self.checkpoint_activations and torch.is_grad_enabled():
            again = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
            return cast(Tensor, again)
        return cast(Tensor, block(*inputs))


class RecurrentConv3d(nn.Module):
    """Recurrent convolution of a 3^3 kernel: y_0 = relu(w * x), y_t = relu(w * (x + y_{t-1})); gives the last
    y.

    Alom et al. 2018 (arXiv:1802.06955), section III, where each step ends in batch normalization. Here the
    kernel is standardized instead: zero mean and the norm that keeps unit variance through the ReLU. It costs
    nothing per voxel, and it is local.
    """

    def __init__(self, channels: int, recurrence: int) -> None:
        super().__init__()
        self.recurrence = recurrence
        self.weight = nn.Parameter(torch.randn(channels, channels, 3, 3, 3))
        self.gain = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def _kernel(self) -> Tensor:
        return _RELU_GAIN * standardized(self.weight, self.gain)

    def forward(self, x: Tensor, periodic: bool) -> Tensor:
        kernel = self._kernel()
        y = F.relu(convolve(x, kernel, self.bias, periodic))
        # x + y has twice the variance of either; the kernel takes the factor, since it is smaller than the
        # mesh.
        kernel = kernel * math.sqrt(0.5)
        for _ in range(self.recurrence):
            y = F.relu(convolve(x + y, kernel, self.bias, periodic))
        return y


def convolve(x: Tensor, kernel: Tensor, bias: Tensor, periodic: bool) -> Tensor:
    """Convolution ``(batch, n_in, z, y, x)`` -> ``(batch, n_out, z, y, x)`` with a cubic kernel of odd side;
    beyond its faces the mesh continues with itself where it is ``periodic``, else with zeros."""
    width = kernel.shape[-1] // 2
    if periodic and width:
        return F.conv3d(wrap(x, width), kernel, bias)
    return F.conv3d(x, kernel, bias, padding=width)


class RecurrentResidualBlock(nn.Module):
    """Two recurrent convolutions with a skip connection around both, after a 1^3 convolution to ``n_out``
    channels.

    Alom et al. 2018 (arXiv:1802.06955), figure 4d. The branch starts at half strength and learns its own
    (SkipInit, De & Smith 2020, arXiv:2002.10444): without batch statistics that is what keeps deep stacks
    stable. Where samples are conditioned on ``features`` numbers, these modulate what the 1^3 convolution
    gives.
    """

    def __init__(self, n_in: int, n_out: int, recurrence: int, features: int = 0) -> None:
        super().__init__()
        self.project = nn.Conv3d(n_in, n_out, 1)
        self.modulation = Modulation(features, n_out) if features else None
        self.first = RecurrentConv3d(n_out, recurrence)
        self.second = RecurrentConv3d(n_out, recurrence)
        self.strength = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor, periodic: bool, features: Tensor | None = None) -> Tensor:
        # Channels last is twice as fast on CPUs; a mesh of one channel does not say which order it has.
        x = self.project(x).contiguous(memory_format=torch.channels_last_3d)
        if self.modulation is not None:
            assert features is not None
            x = self.modulation(x, features)
        return torch.addcmul(x, self.second(self.first(x, periodic), periodic), self.strength.to(x.dtype))

    def reach(self) -> int:
        """Cells of its own mesh that an output depends on, to each side."""
        return self.first.recurrence + self.second.recurrence + 2
