"""Families that draw from every generator of a process while they train, and that are slow to be prepared;
importing this registers them."""

import random
import time
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from galdist.models import MODELS, ModelConfig, TrainingFields
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


class SlowConfig(R2UNetClassifierConfig):
    name: Literal["slow"] = "slow"  # type: ignore[assignment]


class Slow(R2UNetClassifier):
    """A classifier that takes its time with every box when it is prepared."""

    Config: ClassVar[type[ModelConfig]] = SlowConfig

    def prepare(self, training: TrainingFields) -> None:
        def slowly(field: str) -> Iterator[NDArray[Any]]:
            for values in training(field):
                print("looks at a box", flush=True)
                time.sleep(1)
                yield values

        super().prepare(slowly)


MODELS["slow"] = f"{__name__}:Slow"
