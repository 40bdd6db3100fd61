"""What a job asks of the machine."""

import re
from typing import Annotated

from pydantic import BeforeValidator, Field

from hpc.strict import StrictModel

_BYTES = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SECONDS = {"s": 1, "min": 60, "h": 3600, "d": 86400}


def _memory(value: object) -> object:
    match = re.fullmatch(r"\s*([0-9.]+)\s*([KMGT]?)i?B?\s*", value) if isinstance(value, str) else None
    if isinstance(value, str) and not match:
        raise ValueError(f"expected an amount of memory such as 4 GB or 512 MB, got {value!r}")
    return int(float(match[1]) * _BYTES[match[2]]) if match else value


def _duration(value: object) -> object:
    if not isinstance(value, str):
        return value
    if match := re.fullmatch(r"\s*([0-9.]+)\s*(s|min|h|d)\s*", value):
        return int(float(match[1]) * _SECONDS[match[2]])
    if re.fullmatch(r"(\d+-)?\d+:\d{2}(:\d{2})?", value):
        days, _, clock = value.rpartition("-")
        parts = [int(part) for part in clock.split(":")]
        seconds = sum(part * scale for part, scale in zip(reversed(parts), (1, 60, 3600), strict=False))
        return int(days or 0) * 86400 + seconds
    raise ValueError(f"expected a time such as 90 min, 2 h or 1:30:00, got {value!r}")


class Resources(StrictModel):
    """What one job asks for. Absent values are the stage's or the machine's own.

    On one machine ``ranks`` and ``cpus`` decide how many processes run with how many threads each, and
    ``memory`` is what the Dask workers share; ``nodes``, ``gpus`` and ``time`` are requests to a scheduler,
    and where there is none nobody is asked.
    """

    ranks: Annotated[int, Field(ge=1)] | None = None
    """Processes: Dask workers, DDP ranks or MPI ranks."""
    nodes: Annotated[int, Field(ge=1)] | None = None
    cpus: Annotated[int, Field(ge=1)] | None = None
    """Cores, and so threads, of each process."""
    gpus: Annotated[int, Field(ge=0)] | None = None
    """GPUs of each node."""
    memory: Annotated[int, BeforeValidator(_memory), Field(gt=0)] | None = None
    """Bytes for each node; written as ``4 GB``."""
    time: Annotated[int, BeforeValidator(_duration), Field(gt=0)] | None = None
    """Seconds; written as ``90 min`` or ``1:30:00``."""
