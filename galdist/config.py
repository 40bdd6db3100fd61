"""Strict run-file models."""

from pydantic import BaseModel, ConfigDict


class StrictModel(BaseModel):
    """Base of every configuration: unknown keys are errors, values do not change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)
