"""Killed anywhere, the same command finishes the run with the same results.

Every test kills real processes of a real run with SIGKILL (or sends Ctrl-C), looks at what was said, and runs
the same command again.
"""

import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from small_stages import HOLD

import galdist
from hpc import durable, rank

RUNTIMES = ["pieces", "dask", "ddp", "mpi"]
SMALL = [sys.executable, str(Path(__file__).with_name("small_stages.py"))]
GALDIST = [sys.executable, "-m", "galdist"]


@dataclass
class Session:
    """A command in a folder of its own, started as often as a test likes."""

    folder: Path
    command: list[str]
    out: Path
    process: subprocess.Popen[str] | None = None

    @property
    def hold(self) -> Path:
        """While this file is there, the small run stays in the middle of its second step."""
        return self.folder / "hold"

    def start(self) -> None:
        paths = [str(Path(galdist.__file__).parents[1]), str(Path(__file__).parent)]
        self.process = subprocess.Popen(
            self.command,
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), HOLD: str(self.hold)},
        )

    def finish(self, timeout: float) -> tuple[int, str]:
        """Exit status and everything that was said."""
        assert self.process is not None
        text, _ = self.process.communicate(timeout=timeout)
        return self.process.returncode, text

    def run(self, timeout: float) -> tuple[int, str]:
        self.start()
        return self.finish(timeout)

    def spec(self, step: str) -> dict[str, Any]:
        return dict(durable.read_json(self.out / step / ".job" / "spec.json"))

    def processes(self, token: str) -> list[psutil.Process]:
        return [process for process in psutil.process_iter() if rank._belongs(process, token)]

    def child(self, step: str, number: int) -> int:
        """Pid of the process in which a rank's stage runs."""
        return int(durable.read_json(rank.report_path(self.out / step, number))["child"])

    def kill(self) -> None:
        """SIGKILL to the orchestrator."""
        assert self.process is not None
        self.process.kill()
        self.process.communicate()


def until(condition: Callable[[], Any], timeout: float, session: Session | None = None) -> None:
    """Wait for ``condition``, which must come while the session's command runs."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it does not happen"
        if session is not None and session.process is not None and session.process.poll() is not None:
            pytest.fail(f"the run has ended: {session.finish(5)[1]}")
        time.sleep(0.02)


def all_gone(session: Session, token: str, timeout: float = 15) -> None:
    until(lambda: session.processes(token) == [], timeout)


def small(folder: Path, stage: str) -> Session:
    """A run of two steps, the second of the runtime in question."""
    folder.mkdir()
    steps = [
        {"name": "before", "stage": "pieces", "config": {"n_pieces": 2}},
        {
            "name": "victim",
            "stage": stage,
            "inputs": {"before": "before"},
            "config": {"n_pieces": 6},
        },
        {
            "name": "after",
            "stage": "pieces",
            "inputs": {"before": ["before", "victim"]},
            "config": {"n_pieces": 2},
        },
    ]
    (folder / "run.yaml").write_text(yaml.safe_dump({"name": "small", "seed": 5, "steps": steps}))
    return Session(folder, [*SMALL, "run", "run.yaml"], folder / "runs" / "small")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The result of the small run; it is the same for every runtime."""
    session = small(tmp_path_factory.mktemp("undisturbed") / "run", "pieces")
    status, text = session.run(300)
    assert status == 0, text
    return (session.out / "after" / "result.txt").read_text()


@pytest.fixture
def victim(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Session]:
    """The small run held in the middle of its second step, two pieces of which are made."""
    session = small(tmp_path / "run", request.param)
    session.hold.touch()
    session.start()
    try:
        until(lambda: (session.out / "victim" / "piece-1.txt").exists(), 300, session)
        yield session
    finally:
        if session.process is not None and session.process.poll() is None:
            session.kill()


def finishes(session: Session, expected: str) -> None:
    """The same command makes what is missing, and only that."""
    made = {path: path.stat().st_mtime_ns for path in session.out.glob("*/piece-*.txt")}
    session.hold.unlink()
    status, text = session.run(300)
    assert status == 0, text
    assert (session.out / "after" / "result.txt").read_text() == expected
    assert all(path.stat().st_mtime_ns == when for path, when in made.items()), "what was made is kept"
    assert len(made) >= 3


@pytest.mark.parametrize("victim", RUNTIMES, indirect=True)
def test_kill_the_orchestrator(victim: Session, undisturbed: str) -> None:
    """SIGKILL; at once the same command. What the first one left behind does not disturb the second."""
    token = victim.spec("victim")["token"]
    assert victim.processes(token)
    victim.kill()
    finishes(victim, undisturbed)
    assert victim.processes(token) == []


@pytest.mark.parametrize("victim", ["dask"], indirect=True)
def test_a_killed_orchestrators_job_ends_by_itself(victim: Session) -> None:
    token = victim.spec("victim")["token"]
    victim.kill()
    all_gone(victim, token)


@pytest.mark.parametrize("victim", ["dask", "mpi"], indirect=True)
def test_stop(victim: Session, undisturbed: str) -> None:
    """Ctrl-C."""
    assert victim.process is not None
    token = victim.spec("victim")["token"]
    victim.process.send_signal(signal.SIGINT)
    status, text = victim.finish(300)
    assert status == 130
    assert "galdist: stopped in victim" in text
    assert "Continue with: galdist run run.yaml" in text
    assert "Traceback" not in text
    assert victim.processes(token) == []
    finishes(victim, undisturbed)


@pytest.mark.parametrize("victim", ["pieces"], indirect=True)
def test_the_terminal_is_lost(victim: Session, undisturbed: str) -> None:
    assert victim.process is not None
    token = victim.spec("victim")["token"]
    victim.process.send_signal(signal.SIGHUP)
    status, text = victim.finish(300)
    assert status == 129
    assert "galdist: stopped in victim" in text
    assert victim.processes(token) == []
    finishes(victim, undisturbed)


def test_nohup(tmp_path: Path, undisturbed: str) -> None:
    """It goes on without its terminal when told so."""
    session = small(tmp_path / "run", "pieces")
    session.command = ["nohup", *session.command]
    session.hold.touch()
    session.start()
    until(lambda: (session.out / "victim" / "piece-1.txt").exists(), 300, session)
    assert session.process is not None
    session.process.send_signal(signal.SIGHUP)
    session.hold.unlink()
    status, text = session.finish(300)
    assert status == 0, text
    assert (session.out / "after" / "result.txt").read_text() == undisturbed


@pytest.mark.parametrize("victim", ["ddp", "mpi"], indirect=True)
@pytest.mark.parametrize("number", [0, 1])
def test_kill_a_rank(victim: Session, number: int, undisturbed: str) -> None:
    token = victim.spec("victim")["token"]
    os.kill(victim.child("victim", number), signal.SIGKILL)
    killed = time.monotonic()
    status, text = victim.finish(300)
    assert time.monotonic() - killed < 15
    assert status == 1
    assert re.search(rf"step victim failed after .*: rank {number}: killed by signal 9 \(SIGKILL", text), text
    assert "Once mended, continue with: galdist run run.yaml" in text
    assert victim.processes(token) == []
    finishes(victim, undisturbed)


@pytest.mark.parametrize("victim", ["dask"], indirect=True)
def test_kill_a_dask_worker(victim: Session, undisturbed: str) -> None:
    """Another one takes over its tasks: the run does not even fail."""
    main = psutil.Process(victim.child("victim", 0))
    workers = [p for p in main.children(recursive=True) if "spawn_main" in " ".join(p.cmdline())]
    assert len(workers) == 2
    workers[0].kill()
    victim.hold.unlink()
    status, text = victim.finish(300)
    assert status == 0, text
    assert (victim.out / "after" / "result.txt").read_text() == undisturbed


@pytest.mark.parametrize("victim", ["dask"], indirect=True)
def test_kill_the_dask_process(victim: Session, undisturbed: str) -> None:
    """The one with client and scheduler: the step fails, its workers end, the same command continues."""
    token = victim.spec("victim")["token"]
    os.kill(victim.child("victim", 0), signal.SIGKILL)
    status, text = victim.finish(300)
    assert status == 1
    assert "step victim failed" in text
    assert victim.processes(token) == []
    finishes(victim, undisturbed)


@pytest.mark.parametrize("victim", ["pieces"], indirect=True)
def test_a_second_run_is_refused_while_the_first_works(victim: Session) -> None:
    second = Session(victim.folder, victim.command, victim.out)
    status, text = second.run(300)
    assert status == 2
    assert victim.process is not None
    assert f"in use by another run: process {victim.process.pid} on" in text
    victim.hold.unlink()
    assert victim.finish(300)[0] == 0


# The real pipeline, in miniature.

MINIATURE = [
    "universe-a.simulations=3",
    *(
        f"{step}.{value}"
        for step in ("universe-a", "universe-b")
        for value in ("n_particles=32", "box_size=12")
    ),
    *(f"{step}.steps=5" for step in ("universe-a", "universe-b")),
    *(f"{step}.n_mesh=32" for step in ("grids-a", "grids-b")),
    *(f"{step}.split={{validation: [CV_1], test: [CV_2]}}" for step in ("grids-a", "catalog-a")),
    *(f"{step}.epochs=3" for step in ("classifier", "regressor")),
    *(f"{step}.data.crop=16" for step in ("classifier", "regressor")),
    *(f"{step}.model.channels=[4, 8]" for step in ("classifier", "regressor")),
    *(f"{key}.tile=32" for key in ("classifier.data", "regressor.data", "r2unet")),
]
"""What makes the quickstart a matter of minutes."""


def miniature(folder: Path) -> Session:
    sets = [word for value in MINIATURE for word in ("--set", value)]
    return Session(folder, [*GALDIST, "run", "quickstart", *sets], folder / "runs" / "quickstart")


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Session:
    """The miniature, undisturbed."""
    pytest.importorskip("nbodykit")
    session = miniature(tmp_path_factory.mktemp("reference"))
    status, text = session.run(900)
    assert status == 0, text
    assert "report.html" in text
    return session


SPEEDS = {"samples_per_second", "data_wait_fraction"}
"""Metrics of the machine, not of the result."""


def results(out: Path) -> dict[str, Any]:
    """Everything that must not depend on interruptions: metrics, spectra and weights."""
    found: dict[str, Any] = {}
    for path in sorted(out.glob("*/metrics.json")):
        rows = durable.read_json(path)
        found[path.parent.name] = [row for row in rows if row["metric"] not in SPEEDS]
    for path in sorted(out.glob("*/spectra.json")):
        found[f"{path.parent.name} spectra"] = durable.read_json(path)
    for path in sorted(out.glob("*/model/weights.safetensors")):
        found[f"{path.parent.parent.name} weights"] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "who"),
    [
        ("universe-b", "MPI rank"),
        ("grids-a", "Dask worker"),
        ("classifier", "DDP rank"),
        ("classifier", "orchestrator"),
        ("spectra", "orchestrator"),
    ],
)
def test_the_quickstart_survives(step: str, who: str, reference: Session, tmp_path: Path) -> None:
    """From the middle of ``step`` on; everything before it is there already."""
    session = miniature(tmp_path)
    shutil.copytree(reference.out, session.out)
    for name in depending_on(step, session.out):
        shutil.rmtree(session.out / name)
    session.start()
    try:
        progress = session.out / step / "progress.json"
        until(lambda: progress.exists() and durable.read_json(progress)["done"] > 0, 300, session)
        token = session.spec(step)["token"]
        if who == "orchestrator":
            session.kill()
        else:
            pid = session.child(step, 1 if who != "Dask worker" else 0)
            if who == "Dask worker":
                below = psutil.Process(pid).children(recursive=True)
                pid = next(p.pid for p in below if "spawn_main" in " ".join(p.cmdline()))
            os.kill(pid, signal.SIGKILL)
            status, text = session.finish(900)
            assert status == (0 if who == "Dask worker" else 1), text
            if status:
                assert re.search(rf"step {step} failed after .*: rank 1: killed by signal 9", text), text
        status, text = session.run(900)
        assert status == 0, text
        assert session.processes(token) == []
    finally:
        if session.process is not None and session.process.poll() is None:
            session.kill()
    assert results(session.out) == results(reference.out)


def depending_on(step: str, out: Path) -> set[str]:
    """The step and all that reads it, at once or through others."""
    found = {step}
    for entry in yaml.safe_load((out / "run.yaml").read_text())["steps"]:
        if any(name in found for names in entry.get("inputs", {}).values() for name in names):
            found.add(entry["name"])
    return found
