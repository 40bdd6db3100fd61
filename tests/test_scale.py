"""A run of thousands of steps: nothing in planning or following it grows faster than the number of steps.

Times are of the processor, so that other work on the machine changes them little, and only their ratios are
judged. Twice the room that a cost in proportion would need: what grows with the square takes four times it.
"""

import tempfile
import time
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_stages import STAGES

from galdist import config, pipeline, plan, status
from hpc import durable, launch
from hpc.site import Site


def seconds(work: Callable[[], object]) -> float:
    """Best of two, without the garbage collector, whose cost is that of every object of the test process."""
    return min(timeit.repeat(work, timer=time.process_time, number=1, repeat=2))


def many(number: int, n_pieces: int = 0) -> dict[str, Any]:
    """Each step reads the one before it and another one; the last one reads all."""
    steps: list[dict[str, Any]] = [{"name": "s0", "stage": "pieces", "config": {"n_pieces": n_pieces}}]
    for n in range(1, number - 1):
        names = sorted({f"s{n - 1}", f"s{n // 2}"})
        steps.append({"name": f"s{n}", "stage": "pieces", "inputs": {"before": names}})
        steps[-1]["config"] = {"n_pieces": n_pieces}
    steps.append({"name": "report", "stage": "many", "inputs": {"sources": "*"}})
    return {"name": "many", "seed": 1, "steps": steps}


def swept(number: int) -> dict[str, Any]:
    """One sweep, a step that follows it, and one that reads all."""
    return {
        "name": "swept",
        "steps": [
            {"name": "a", "stage": "pieces", "sweep": {"seed": list(range(number // 2))}},
            {"name": "b", "stage": "one", "inputs": {"source": "a"}, "sweep": "a"},
            {"name": "report", "stage": "many", "inputs": {"sources": "*"}},
        ],
    }


def load(folder: Path, data: dict[str, Any]) -> config.Run:
    path = folder / "run.yaml"
    path.write_text(yaml.dump(data, Dumper=config._DUMPER))
    return config.load(str(path), (), STAGES)


@pytest.mark.parametrize("make", [many, swept])
def test_planning(make: Callable[[int], dict[str, Any]], tmp_path: Path) -> None:
    """From the run file to what would run, as ``--dry-run`` does it."""

    def dry_run(number: int) -> None:
        steps = plan.plan(load(tmp_path, make(number)), tmp_path / "out", stages=STAGES)
        assert len(steps) in (number, number + 1)
        assert all(entry.runs for entry in steps)

    dry_run(10)  # imports
    small = seconds(lambda: dry_run(1000))
    large = seconds(lambda: dry_run(4000))
    print(f"1000 steps: {small:.2f} s, 4000 steps: {large:.2f} s")
    assert large < 8 * small


def test_steps_that_do_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the pipeline itself needs: to run them, to find them done, to put all aside and take them back."""
    monkeypatch.setattr(durable, "sync_path", lambda path: None)  # the disk is not in question

    def live(number: int) -> None:
        out = Path(tempfile.mkdtemp(dir=tmp_path))
        run, other = load(tmp_path, many(number)), load(tmp_path, {**many(number), "seed": 2})
        for which in (run, run, other, run):
            pipeline.execute(which, out, Site(launcher="debug"), stages=STAGES)
        assert {step.state for step in status.view(out).steps} == {"done"}
        assert len(list((out / ".replaced").iterdir())) == number

    small = seconds(lambda: live(100))
    large = seconds(lambda: live(400))
    print(f"100 steps: {small:.2f} s, 400 steps: {large:.2f} s, four runs of each")
    assert large < 8 * small


class Endless:
    """A job that runs on, in place of thousands of real ones."""

    def __init__(self) -> None:
        self.looks = 0

    def poll(self) -> launch.Outcome | None:
        self.looks += 1
        return None

    def about(self) -> launch.JobInfo:
        return launch.JobInfo("1", "running", ("n1",))

    def cancel(self, grace: float = 10.0) -> None:
        raise AssertionError


def test_jobs_that_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A moment of a run with a thousand jobs, and as many steps that wait, is one of a run with a hundred."""
    monkeypatch.setattr(launch, "submit_array", lambda tasks, *others: [Endless() for _ in tasks])

    def execution(number: int) -> pipeline._Execution:
        run = load(tmp_path, swept(2 * number))
        out = tmp_path / f"out-{number}"
        out.mkdir()
        steps = plan.plan(run, out, stages=STAGES)
        made = pipeline._Execution(run, out, Site(launcher="slurm"), steps)
        made._start_ready(lambda view: None)
        assert len(made._running) == number
        return made

    def moments(of: pipeline._Execution) -> None:
        for _ in range(40):
            of._start_ready(lambda view: None)
            of._look()

    small, large = execution(100), execution(1000)
    assert seconds(lambda: moments(large)) < 3 * seconds(lambda: moments(small))
    looks = [running.job.looks for running in large._running.values() if isinstance(running.job, Endless)]
    assert max(looks) - 1 <= min(looks) > 0, "each has its turn"
