"""Which steps of a run may start now. Knows names only; the cost of a step does not grow with the run."""

import collections
import heapq
from collections.abc import Collection, Iterable, Mapping

from galdist.config import Sweep


class Schedule:
    """Steps to do, each after those it reads and as early as there is room for it.

    Parameters
    ----------
    steps:
        Step -> the steps it reads, in the order in which they are to start where several may. A step that is
        read and is not among the keys is done already.
    parallel:
        Most steps that run at the same time.
    sweeps:
        By the name of the swept step. No more members run at the same time than ``at_once``, unless they all
        start together: then whoever starts them keeps to it.
    """

    def __init__(
        self, steps: Mapping[str, Collection[str]], parallel: int, sweeps: Mapping[str, Sweep]
    ) -> None:
        self._parallel = parallel
        self._place = {name: number for number, name in enumerate(steps)}
        self._sweep_of = {name: swept for swept, sweep in sweeps.items() for name in sweep.members}
        self._limit = {
            name: sweep.at_once for name, sweep in sweeps.items() if sweep.at_once and parallel > 1
        }
        self._readers: dict[str, list[str]] = {name: [] for name in steps}
        self._needs: dict[str, int] = {}  # of steps that wait: how many of their inputs are not done
        self._ready: set[str] = set()
        self._queue: list[tuple[int, str]] = []  # a heap of what is ready, and of what has left meanwhile
        self._held: dict[str, collections.deque[str]] = {name: collections.deque() for name in self._limit}
        self._active: collections.Counter[str] = collections.Counter()
        self._running: set[str] = set()
        for name, reads in steps.items():
            inputs = {other for other in reads if other in steps}
            for other in inputs:
                self._readers[other].append(name)
            self._needs[name] = len(inputs)
        self._release(name for name in steps if self._needs[name] == 0)

    @property
    def over(self) -> bool:
        """Whether nothing runs and nothing may start."""
        return not self._running and not self._ready

    @property
    def ready(self) -> list[str]:
        """Steps that may start as soon as there is room."""
        return sorted(self._ready, key=self._place.__getitem__)

    def start(self, name: str) -> None:
        """A ready step runs, whether or not there is room: it was found running."""
        self._ready.remove(name)
        self._running.add(name)
        self._active[self._sweep_of.get(name, "")] += 1

    def take(self) -> list[list[str]]:
        """Start what there is room for; members of one sweep stand together."""
        groups: dict[str, list[str]] = {}
        for swept, limit in self._limit.items():
            active = self._active[swept]
            for name in self._next(self._held[swept], limit - active if active else self._parallel):
                groups.setdefault(swept, []).append(name)
        while self._queue and len(self._running) < self._parallel:
            name = heapq.heappop(self._queue)[1]
            if name in self._ready:
                self.start(name)
                groups.setdefault(self._sweep_of.get(name, name), []).append(name)
        return list(groups.values())

    def _next(self, held: "collections.deque[str]", most: int) -> Iterable[str]:
        while held and most > 0 and len(self._running) < self._parallel:
            name = held.popleft()
            if name in self._ready:
                self.start(name)
                most -= 1
                yield name

    def put_back(self, name: str) -> None:
        """What `take` gave could not start now."""
        self._leave(name)
        self._release([name])

    def done(self, name: str) -> None:
        """A running step is done; what waited for it alone is ready."""
        self._leave(name)
        for reader in self._readers[name]:
            if reader in self._needs:
                self._needs[reader] -= 1
        self._release(reader for reader in self._readers[name] if self._needs.get(reader) == 0)

    def failed(self, name: str) -> list[tuple[str, str]]:
        """A running step failed; returns what can no longer be done, each with the input it misses."""
        self._leave(name)
        blocked: list[tuple[str, str]] = []
        causes = [name]
        while causes:
            cause = causes.pop()
            for reader in self._readers[cause]:
                if self._needs.pop(reader, None) is not None:
                    blocked.append((reader, cause))
                    causes.append(reader)
        return blocked

    def _leave(self, name: str) -> None:
        self._running.remove(name)
        self._active[self._sweep_of.get(name, "")] -= 1

    def _release(self, names: Iterable[str]) -> None:
        for name in names:
            self._needs.pop(name, None)
            self._ready.add(name)
            if self._sweep_of.get(name) in self._limit:
                self._held[self._sweep_of[name]].append(name)
            else:
                heapq.heappush(self._queue, (self._place[name], name))
