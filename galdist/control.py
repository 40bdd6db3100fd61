"""A run in the hands of someone who does not wait for it: queue its orchestrator, follow its logs, end it."""

import contextlib
import os
import re
import signal
import socket
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil

from galdist.config import Run
from galdist.plan import PlannedStep
from galdist.status import PLAN, holder, on_cluster, view
from hpc import durable, launch, rank, slurm
from hpc.site import Site
from hpc.slurm import JobState
from hpc.strict import Problem, SettingsError, nearest

ORCHESTRATOR = ".orchestrator"
"""Folder, in the run's, of the job that orchestrates it."""
_JOB = "job.json"  # in that folder: the job
_BEGAN = "began"  # in that folder, once the command runs
_PATIENCE = 60.0  # seconds for an orchestrator to end its jobs and itself
_PAUSE = 0.3  # seconds between looks at a log
_BREATH = 1.0  # seconds between looks at a job that is to end
_QUESTIONS = 3.0  # seconds between questions whether a step goes on
_CALM = 30.0  # the same about the job of an orchestrator that is seen at work
_ENDING = 8  # jobs that are ended at the same time


def last_run(runs: Path = Path("runs")) -> Path:
    """The run that was worked on last, by the times of its files.

    Raises
    ------
    hpc.strict.SettingsError
        where ``runs`` has none.
    """
    # Whatever a step writes goes through a temporary name, which changes the time of its folder.
    touched = {
        plan.parent: max(path.stat().st_mtime for path in plan.parent.iterdir())
        for plan in runs.glob(f"*/{PLAN}")
    }
    if not touched:
        text = "there is no run here: name the folder of one, or go to where its runs/ is"
        raise SettingsError(str(runs), [Problem((), text)])
    return max(touched, key=lambda folder: touched[folder])


def step_folder(out: Path, name: str) -> Path:
    """The folder of a step, or of the run's ``orchestrator``.

    Raises
    ------
    hpc.strict.SettingsError
        where there is no run, or no such step in it.
    """
    names = [step.name for step in view(out).steps]
    if name in names:
        return out / name
    if name == "orchestrator":
        return out / ORCHESTRATOR
    raise SettingsError(str(out), [Problem((), f"there is no step {name!r}{nearest(name, names)}")])


def queue(
    run: Run, out: Path, steps: list[PlannedStep], site: Site, command: list[str], again: list[str]
) -> str:
    """Queue a job that orchestrates a run; returns its id.

    Parameters
    ----------
    steps:
        What it is to do.
    command:
        How it does that, as arguments of Python, in the folder that is current now.
    again:
        How it goes on where ``command`` has begun and was interrupted.

    Raises
    ------
    hpc.slurm.SlurmError
        where Slurm refuses the job.
    """
    folder = out / ORCHESTRATOR
    folder.mkdir(parents=True, exist_ok=True)
    for name in (_JOB, _BEGAN, "log.txt"):
        (folder / name).unlink(missing_ok=True)
    durable.write_text(out / "run.yaml", run.to_yaml())  # so that it can be watched while it waits
    durable.write_json(out / PLAN, {entry.name: entry.fingerprint for entry in steps})
    comment = uuid.uuid4().hex
    durable.write_json(folder / _JOB, {"comment": comment})
    log = rank.log_path(folder.absolute(), 0)
    arguments = {"command": command, "again": again, "directory": os.getcwd(), "out": str(out.absolute())}
    (id,) = slurm.submit(
        "galdist.control:orchestrate",
        [arguments],
        folder,
        f"galdist-{run.file.name}",
        site.orchestrator.layout("serial", 1),
        site.orchestrator,
        site.model_copy(update={"directives": (*site.directives, f"--output={log}")}),
        comment,
    )
    durable.write_json(folder / _JOB, {"comment": comment, "id": id})
    return id


def orchestrate(command: list[str], again: list[str], directory: str, out: str) -> None:
    """Become the orchestrator. This is what the job of `queue` does, every time it starts."""
    began, plan = Path(out, ORCHESTRATOR, _BEGAN), Path(out, PLAN)
    if not began.exists():
        began.touch()
    elif plan.stat().st_mtime > began.stat().st_mtime:  # the command wrote it, and so had begun
        command = again
    os.chdir(directory)
    os.execv(sys.executable, [sys.executable, *command])


def orchestrator_job(out: Path) -> JobState | None:
    """The job that orchestrates a run, where one waits or runs.

    Raises
    ------
    hpc.slurm.Unreachable
        where Slurm does not answer.
    """
    try:
        entry = durable.read_json(out / ORCHESTRATOR / _JOB)
    except FileNotFoundError:
        return None
    # Who was killed while it was queued could not write its id.
    ids = [entry["id"]] if "id" in entry else slurm.find(entry["comment"])
    return next((state for state in slurm.states(ids).values() if not state.is_over), None)


def worker(out: Path) -> str | None:
    """Who works on a run, or waits to, in words; None for nobody."""
    who = holder(out)
    asked, held, words = _answers.get(out, (float("-inf"), None, None))
    # Whoever watches asks every second. A lock shows at once that something has changed.
    if held != who or time.monotonic() - asked > (_QUESTIONS if who is None else _CALM):
        words = _job_in_words(out, who)
        _answers[out] = time.monotonic(), who, words
    return words or who


_answers: dict[Path, tuple[float, str | None, str | None]] = {}
"""Run -> when Slurm was asked, who held its lock then, and what Slurm said."""


def _job_in_words(out: Path, who: str | None) -> str | None:
    try:
        job = orchestrator_job(out)
    except slurm.Unreachable:
        return None if who else "a job, maybe: Slurm does not answer"
    except slurm.SlurmError:  # a machine without Slurm, to which the folder was brought
        return None
    if job is None:
        return None
    if job.is_pending:
        return f"job {job.id}, which waits in the queue" + (f" ({job.reason})" if job.reason else "")
    return f"job {job.id} on {' '.join(job.nodes)}"


def log(
    out: Path, folder: Path, number: int, follow: bool, say: Callable[[str], None] = lambda why: None
) -> Iterator[bytes]:
    """The log of a rank, and with ``follow`` what is added to it, across restarts, until its step is over.

    Parameters
    ----------
    folder:
        The step's, in the run ``out``.
    say:
        Told why nothing comes, and, with nothing, that something comes again.

    Raises
    ------
    hpc.strict.SettingsError
        where the step is over, or nobody wants to wait, and there is no such log.
    """
    path, position = rank.log_path(folder, number), 0
    asked, said = float("-inf"), ""
    goes_on = True
    while goes_on:
        if time.monotonic() - asked > _QUESTIONS:  # before the log is read, so that its end is not missed
            asked = time.monotonic()
            goes_on, why = _goes_on(out, folder)
            goes_on &= follow
            if why != said:
                say(said := why)
        if path.exists():
            with open(path, "rb") as stream:
                # A log that shrank is another one: the step's folder was put aside and made anew.
                stream.seek(position if position <= path.stat().st_size else 0)
                while chunk := stream.read(65536):
                    yield chunk
                position = stream.tell()
        if goes_on:
            time.sleep(_PAUSE)
    if not path.exists():
        there = ", ".join(sorted(found.name for found in folder.glob("log*.txt"))) or "none"
        raise SettingsError(str(path), [Problem((), f"there is no such log; logs there: {there}")])


def _goes_on(out: Path, folder: Path) -> tuple[bool, str]:
    """Whether more will be written to a log, and what to tell those who wait."""
    if folder.name == ORCHESTRATOR:
        try:
            job = orchestrator_job(out)
        except slurm.Unreachable:
            return True, "nobody knows: Slurm does not answer"
        return job is not None, _queued(job.id, job.reason) if job is not None and job.is_pending else ""
    step = next(step for step in view(out).steps if step.name == folder.name)
    match step.state:
        case "running":
            return True, ""
        case "queued" if step.job is not None:
            return True, _queued(step.job.id, step.job.reason)
        case "done" | "failed":
            return False, ""
        case _:
            comes = worker(out) is not None
            return comes, "has not started yet" if comes else ""


def _queued(id: str, reason: str) -> str:
    return f"queued as job {id}" + (f" ({reason})" if reason else "")


def cancel(out: Path, step: str | None = None) -> Iterator[str]:
    """End what runs or waits of a run, or of one of its steps; says what it ended.

    Raises
    ------
    hpc.strict.SettingsError
        where there is no such run or step, and where its orchestrator is out of reach.
    hpc.slurm.SlurmError
        where Slurm does not end a job.
    """
    only = step_folder(out, step).name if step is not None else None
    if only in (None, ORCHESTRATOR):
        yield from _end_orchestrator(out)
    if only != ORCHESTRATOR:
        jobs = {
            entry.name: entry.job
            for entry in view(out).steps
            if entry.state in ("queued", "running") and entry.job is not None and only in (None, entry.name)
        }
        with ThreadPoolExecutor(_ENDING) as pool:
            list(pool.map(lambda name: launch.end_leftovers(out / name), jobs))
        yield from (f"{name}: {'job ' if on_cluster(job) else ''}{job.id}" for name, job in jobs.items())


def _end_orchestrator(out: Path) -> Iterator[str]:
    deadline = time.monotonic() + _PATIENCE
    if job := orchestrator_job(out):
        slurm.cancel(job.id)
        while orchestrator_job(out) is not None:
            _wait(out, f"job {job.id}", deadline, _BREATH)
        yield f"orchestrator: job {job.id}"
    if (who := holder(out)) is None:
        return
    match = re.match(r"process (\d+) on (\S+),", who)
    if match is None or match[2] != socket.gethostname():
        text = f"in use by {who}: call galdist cancel there, or scancel, where it is in a job of yours"
        raise SettingsError(str(out), [Problem((), text)])
    with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended by itself
        process = psutil.Process(int(match[1]))
        process.send_signal(signal.SIGINT)  # as Ctrl-C does: it ends its jobs
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            _wait(out, f"process {process.pid}", deadline, _PAUSE)
    yield f"orchestrator: process {match[1]}"


def _wait(out: Path, who: str, deadline: float, pause: float) -> None:
    if time.monotonic() > deadline:
        raise TimeoutError(f"{out}: {who} was told to end {_PATIENCE:.0f} s ago and still runs")
    time.sleep(pause)
