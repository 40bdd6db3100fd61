"""Signals at a certain moment of a rank's work, sent by the rank itself: from outside they may come late.

A rank looks where all ranks vote, which is where they can stop.
"""

import json
import os
import signal
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

VARIABLE = "TEST_MOMENT"


@dataclass(frozen=True)
class Moment:
    """When a signal is sent, and to whom."""

    signum: int
    pattern: str
    """Of files in the step's folder."""
    number: int = 1
    """How many of them must be there."""
    votes: int = 0
    """Votes that pass from then on."""
    rank: int | None = None
    """Who gets the signal; None for every process of all ranks, as a scheduler does it."""

    def environment(self) -> dict[str, str]:
        """What `arm` reads in a rank."""
        return {VARIABLE: json.dumps(asdict(self))}


def arm(out: Path) -> None:
    """Send the signal that the environment asks for, if any, when its moment has come."""
    if VARIABLE not in os.environ:
        return
    from hpc import ddp

    moment = Moment(**json.loads(os.environ[VARIABLE]))
    if int(os.environ["RANK"]) != (moment.rank or 0):
        return
    vote, votes = ddp.Group.any, 0

    def look_and_vote(group: ddp.Group, *flags: bool) -> tuple[bool, ...]:
        nonlocal votes
        if votes or len(list(out.glob(moment.pattern))) >= moment.number:
            votes += 1
        if votes == moment.votes + 1:
            (os.killpg if moment.rank is None else os.kill)(os.getpid(), signal.Signals(moment.signum))
        return vote(group, *flags)

    setattr(ddp.Group, "any", look_and_vote)  # noqa: B010 - mypy does not let methods be replaced


def stopped_at(pattern: str, **more: Any) -> Moment:
    """SIGSTOP to the main rank, which then waits for SIGCONT."""
    return Moment(signal.SIGSTOP, pattern, rank=0, **more)
