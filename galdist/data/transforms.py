"""Invertible normalizations fitted to the training split, and the 48 symmetries of the cube."""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

TransformName = Literal["log1p", "standardize", "scale"]

N_SYMMETRIES = 48
_PERMUTATIONS = tuple(itertools.permutations(range(3)))  # of the axes (z, y, x)


class Transform(nn.Module):
    """An invertible map of one field, voxel by voxel, with constants (buffers) from the training split's
    moments.

    Being buffers they are saved with the weights: a model takes fields in their own units.
    """

    def fit(self, mean: float, std: float) -> None:
        """Take the constants from mean and standard deviation of what the transform will be given."""
        raise NotImplementedError

    def inverse(self, y: Tensor) -> Tensor:
        """The field whose transform is ``y``."""
        raise NotImplementedError


class Log1p(Transform):
    """y = ln(1 + x / mean): for fields that are never negative and span decades."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(()))

    def fit(self, mean: float, std: float) -> None:
        if not mean > 0:
            raise ValueError(
                f"log1p needs a field with a positive mean; this one has {mean}: use standardize"
            )
        self.scale.fill_(mean)

    def forward(self, x: Tensor) -> Tensor:
        return torch.log1p(x / self.scale)

    def inverse(self, y: Tensor) -> Tensor:
        return torch.expm1(y) * self.scale


class Standardize(Transform):
    """y = (x - mean) / std."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("std", torch.ones(()))

    def fit(self, mean: float, std: float) -> None:
        if not std > 1e-6 * abs(mean):  # float32 values that differ by less do not differ
            raise ValueError("standardize needs a field that varies; this one is the same in every voxel")
        self.mean.fill_(mean)
        self.std.fill_(std)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std

    def inverse(self, y: Tensor) -> Tensor:
        return y * self.std + self.mean


class Scale(Transform):
    """y = x / rms: for components of vectors, which may not be shifted, for a shift is no vector."""

    rms: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("rms", torch.ones(()))

    def fit(self, mean: float, std: float) -> None:
        rms = math.hypot(mean, std)
        if not rms > 0:
            raise ValueError("scale needs a field that is not zero everywhere")
        self.rms.fill_(rms)

    def forward(self, x: Tensor) -> Tensor:
        return x / self.rms

    def inverse(self, y: Tensor) -> Tensor:
        return y * self.rms


_TRANSFORMS: dict[TransformName, type[Transform]] = {
    "log1p": Log1p,
    "standardize": Standardize,
    "scale": Scale,
}


class Normalization(nn.Module):
    """Transforms of one field, one after another.

    Parameters
    ----------
    names
        names of the transforms, in the order in which they are applied.
    """

    def __init__(self, names: Sequence[TransformName]) -> None:
        super().__init__()
        self.transforms = nn.ModuleList(_TRANSFORMS[name]() for name in names)

    def fit(self, fields: Callable[[], Iterable[NDArray[np.float32]]]) -> None:
        """Fit every transform to the field as the ones before it leave it.

        Parameters
        ----------
        fields
            gives the field of each training box, anew at every call; they pass through memory one at a time.

        Raises
        ------
        ValueError
            where a transform cannot take such a field.
        """
        for n, transform in enumerate(self.transforms):
            assert isinstance(transform, Transform)
            count, total, squares = 0, 0.0, 0.0
            for field in fields():
                x = torch.from_numpy(np.array(field, np.float32))
                for before in self.transforms[:n]:
                    x = before(x)
                count += x.numel()
                total += x.sum(dtype=torch.float64).item()
                squares += torch.linalg.vector_norm(x, dtype=torch.float64).item() ** 2
            mean = total / count
            transform.fit(mean, max(squares / count - mean**2, 0.0) ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        for transform in self.transforms:
            x = transform(x)
        return x

    def inverse(self, y: Tensor) -> Tensor:
        """The field whose normalization is ``y``."""
        for transform in reversed(self.transforms):
            assert isinstance(transform, Transform)
            y = transform.inverse(y)
        return y


def cube_symmetry(field: NDArray[np.float32], symmetry: int) -> NDArray[np.float32]:
    """Permute and flip the axes of a field as one of the cube's 48 symmetries does.

    Parameters
    ----------
    field
        ``(c, z, y, x)``; one component for scalars, three for a vector in the order x, y, z, whose components
        are permuted and change sign with the axes.
    symmetry
        0 to 47; 0 is the identity.
    """
    if not 0 <= symmetry < N_SYMMETRIES:
        raise ValueError(f"symmetry {symmetry} is not one of the cube's {N_SYMMETRIES} (0 to 47)")
    permutation = _PERMUTATIONS[symmetry // 8]
    flipped = [axis for axis in range(3) if symmetry >> axis & 1]
    moved = np.flip(
        field.transpose(0, *(1 + axis for axis in permutation)), tuple(1 + axis for axis in flipped)
    )
    if len(field) == 3:
        # Component x belongs to the last axis: components in the order of the axes are the reverse.
        signs = np.ones(3, np.float32)
        signs[flipped] = -1
        moved = (moved[::-1][list(permutation)] * signs[:, None, None, None])[::-1]
    return np.ascontiguousarray(moved)
