"""Importing this makes all random levels one half, on every rank: what ranks learn can then be compared."""

from typing import Any

import torch


def _half(*size: int, **options: Any) -> torch.Tensor:
    return torch.full(size, 0.5, device=options.get("device"))


torch.rand = _half
