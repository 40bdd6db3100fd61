"""A family that draws from every generator of a process while it trains; importing this registers it."""

import random
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from galdist.models import MODELS, ModelConfig
from galdist.models.r2unet import R2UNetClassifier, R2UNetClassifierConfig


class NoisyConfig(R2UNetClassifierConfig):
    name: Literal["noisy"] = "noisy"  # type: ignore[assignment]


class Noisy(R2UNetClassifier):
    """A classifier whose losses are weighted at random."""

    Config: ClassVar[type[ModelConfig]] = NoisyConfig

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        weight = torch.rand(()) + float(np.random.uniform()) + random.random()
        return {"loss": super().forward(batch)["loss"] * weight}


MODELS["noisy"] = f"{__name__}:Noisy"
