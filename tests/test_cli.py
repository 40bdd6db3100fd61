"""The command line: quick, clear, without tracebacks."""

import contextlib
import os
import pty
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from small_stages import HOLD

import galdist

PROGRAM = [sys.executable, str(Path(__file__).with_name("small_stages.py"))]
HEAVY = ("torch", "dask", "distributed", "zarr", "numpy", "h5py", "matplotlib", "mpi4py", "pandas")


def environment(**more: str) -> dict[str, str]:
    """Of a command, whatever cluster or site this is run on."""
    path = os.pathsep.join([str(Path(galdist.__file__).parents[1]), str(Path(__file__).parent)])
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("SLURM", "SSH_", "GALDIST_SITE", "PYTHONUNBUFFERED"))
    }
    return {**kept, "PYTHONPATH": path, "COLUMNS": "120", **more}


def call(
    *arguments: str, cwd: Path, status: int | None = 0, program: list[str] = PROGRAM, **variables: str
) -> str:
    """Both outputs of the command, which must end with ``status``."""
    done = subprocess.run(
        [*program, *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env=environment(**variables),
    )
    assert status is None or done.returncode == status, done.stdout + done.stderr
    assert not any(line.startswith("Traceback") for line in done.stderr.splitlines())
    return done.stdout + done.stderr


def write(folder: Path, stage: str = "pieces") -> None:
    steps = [
        {"name": "a", "stage": stage, "config": {}},
        {"name": "b", "stage": "pieces", "inputs": {"before": "a"}},
    ]
    (folder / "study.yaml").write_text(yaml.safe_dump({"name": "study", "seed": 1, "steps": steps}))


@contextlib.contextmanager
def started(*arguments: str, cwd: Path, program: list[str] = PROGRAM) -> Iterator[subprocess.Popen[str]]:
    """The command while it runs, held by the file ``hold`` where there is one; its outputs come together."""
    process = subprocess.Popen(
        [*program, *arguments],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(**{HOLD: str(cwd / "hold")}),
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


@contextlib.contextmanager
def held(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """The run of `write` in the middle of its first step, until somebody removes the file ``hold``."""
    (folder / "hold").touch()
    with started("run", "study.yaml", cwd=folder) as run:
        until(lambda: (folder / "runs/study/a/piece-1.txt").exists())
        yield run


def until(condition: Callable[[], object], timeout: float = 300) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.05)


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys; sys.argv = ['galdist', '--help']\n"
        "from galdist.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        f"print('HEAVY', [name for name in {HEAVY!r} if name in sys.modules])"
    )
    text = call(cwd=tmp_path, program=[sys.executable, "-c", code])
    assert "Run the steps of a run file" in text
    assert "HEAVY []" in text


def test_help_costs_little_more_than_its_parser(tmp_path: Path) -> None:
    def fastest(program: list[str]) -> float:
        times = []
        for _ in range(3):
            before = sum(os.times()[2:4])
            call(cwd=tmp_path, program=program)
            times.append(sum(os.times()[2:4]) - before)  # of the processor, for which others may wait as well
        return min(times)

    parser = fastest([sys.executable, "-c", "import typer, rich.console, rich.table, rich.markdown"])
    assert fastest([sys.executable, "-m", "galdist", "--help"]) < 3 * parser + 0.1


def test_the_orchestrator_stays_clean(tmp_path: Path) -> None:
    """Checking the real stages loads neither MPI nor nbodykit, which would make Dask synchronous."""
    code = (
        "import sys\n"
        "from galdist import config\n"
        "config.load('quickstart')\n"
        "print('LOADED', [name for name in ('nbodykit', 'pmesh', 'mpi4py', 'matplotlib', 'distributed')"
        " if name in sys.modules])"
    )
    assert "LOADED []" in call(cwd=tmp_path, program=[sys.executable, "-c", code])


def test_version_and_no_arguments(tmp_path: Path) -> None:
    program = [sys.executable, "-m", "galdist"]
    assert call("--version", cwd=tmp_path, program=program).strip() == f"galdist {galdist.__version__}"
    assert "Usage" in call(cwd=tmp_path, program=program, status=None)


def test_a_run_from_plan_to_results(tmp_path: Path) -> None:
    write(tmp_path)
    text = call("run", "study.yaml", "--dry-run", cwd=tmp_path)
    assert "2 of 2 steps would run. Nothing was changed." in text
    assert not (tmp_path / "runs").exists()
    text = call("run", "study.yaml", "--set", "a.n_pieces=2", cwd=tmp_path)
    assert text.count("a  starts (pieces): new") == 1
    assert "b  done in 0:0" in text
    total = (tmp_path / "runs" / "study" / "b" / "result.txt").read_text()
    lines = text.splitlines()
    row = lines[lines.index("Results of b") + 2]
    assert row.split() == ["total", f"{float(total):.4g}"]
    text = call("run", "study.yaml", "--dry-run", cwd=tmp_path)
    assert "config changed: n_pieces: 2 -> 4" in text
    assert "input a changed" in text
    text = call("run", "study.yaml", "--set", "a.n_pieces=2", "--dry-run", cwd=tmp_path)
    assert "0 of 2 steps would run" in text
    lines = call("status", "runs/study", cwd=tmp_path).splitlines()
    assert lines[0] == "runs/study: nobody works here"
    assert lines[2].split()[:3] == ["a", "pieces", "done"]
    assert "total" in call("show", "runs/study", cwd=tmp_path)
    report = tmp_path / "runs" / "study" / "b" / "report.html"
    report.touch()
    text = call("run", "study.yaml", "--set", "a.n_pieces=2", cwd=tmp_path)
    assert text.splitlines()[-1] == f"report: {report}", "last, where it is seen"


def test_the_plan_of_a_run_in_an_allocation(tmp_path: Path) -> None:
    """It has what the steps would get of that: here two nodes with three ranks each."""
    steps = [{"name": stage, "stage": stage} for stage in ("pieces", "dask", "ddp", "mpi")]
    steps.append({"name": "small", "stage": "ddp", "resources": {"ranks": 1, "cpus": 2}})
    steps.append({"name": "other", "stage": "one", "inputs": {"source": "pieces"}})
    (tmp_path / "study.yaml").write_text(yaml.safe_dump({"name": "study", "seed": 1, "steps": steps}))
    words = ["run", "study.yaml", "--in-allocation", "--dry-run"]
    words += [word for stage in ("pieces", "dask", "ddp", "mpi") for word in ("--stage", stage)]
    job = {"SLURM_JOB_ID": "12", "SLURM_JOB_NUM_NODES": "2"}
    job |= {"SLURM_TASKS_PER_NODE": "3(x2)", "SLURM_JOB_CPUS_PER_NODE": "6(x2)"}
    title, _, *rows, _ = call(*words, cwd=tmp_path, **job).splitlines()
    assert title == "Plan of runs/study"
    assert {row.split()[0]: re.split("  +", row.strip())[4:] for row in rows} == {
        "pieces": ["serial x 1", "nodes 1, cpus 6, gpus 0"],
        "dask": ["dask x 2", "nodes 1, cpus 1, gpus 0"],
        "ddp": ["ddp x 6", "nodes 2, cpus 2, gpus 0"],
        "mpi": ["mpi x 6", "nodes 2, cpus 2, gpus 0"],
        "small": ["ddp x 1", "nodes 1, cpus 2, gpus 0"],
        "other": [],
    }


def test_a_pipe_is_written_line_by_line(tmp_path: Path) -> None:
    """What a step says is there before the run ends."""
    write(tmp_path)
    with started("run", "study.yaml", "--set", "a.seconds=3", cwd=tmp_path) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "starts (pieces)" in line:
                break
        assert process.poll() is None
        process.terminate()
        process.communicate(timeout=300)
        assert process.returncode == 143


def test_a_failing_step(tmp_path: Path) -> None:
    write(tmp_path, "fail")
    text = call("run", "study.yaml", "--out", "here", cwd=tmp_path, status=1)
    assert "galdist: step a failed after 0:0" in text
    assert "ValueError: snapshot.hdf5: PartType1/Coordinates is missing" in text
    assert "last lines of here/a/log.txt" in text
    assert "  | ValueError: snapshot.hdf5" in text
    assert "continue with: galdist run study.yaml --out here" in text
    assert "failed" in call("status", "here", cwd=tmp_path)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "study.yaml", "--set", "a.n_peices=3"], "unknown key; did you mean n_pieces?"),
        (["run", "study.yaml", "--site", "nowhere"], "no such site"),
        (["run", "study.yaml", "--from", "z"], "--from: there is no step 'z'"),
        (["run", "nothing.yaml"], "cannot be read: No such file or directory"),
        (["run", "quickstrat"], "no experiment has this name"),
        (["run", "study.yaml", "--form", "a"], "No such option"),
        (["run", "study.yaml", "--only", "z"], "--only: there is no step 'z'"),
        (["run", "study.yaml", "--stage", "peaces"], "there is no stage 'peaces'; did you mean pieces?"),
        (
            ["run", "study.yaml", "--stage", "train"],
            "no step of this run has stage train; its stages: pieces",
        ),
        (["run", "study.yaml", "--only", "b"], "reads a, which is not done"),
        (["run", "study.yaml", "--in-allocation"], "sbatch slurm/train.sbatch FILE"),
        (["run", "study.yaml", "--detach"], "needs a cluster, and --site local is this machine"),
        (["run", "study.yaml", "--detach", "--in-allocation"], "one or the other"),
        (["status"], "there is no run here"),
        (["watch", "nowhere"], "there is no run here"),
        (["logs", "a"], "there is no run here"),
        (["logs", "nowhere/a"], "there is no run here"),
        (["cancel", "nowhere"], "there is no run here"),
        (["tensorboard", "nowhere"], "there is no run here"),
        (["site", "check", "nowhere"], "no such site"),
        (["status", "nowhere"], "there is no run here"),
        (["show", "nowhere"], "there is no run here"),
        (["config", "study.yaml", "--set", "x"], "'x' is not key=value"),
    ],
)
def test_wrong_input_ends_with_two(arguments: list[str], said: str, tmp_path: Path) -> None:
    write(tmp_path)
    assert said in call(*arguments, cwd=tmp_path, status=2)
    assert not (tmp_path / "runs").exists()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "runs").write_text("a file")
    assert "runs" in call("run", "study.yaml", cwd=tmp_path, status=1)


def test_config_prints_every_default(tmp_path: Path) -> None:
    write(tmp_path)
    data = yaml.safe_load(call("config", "study.yaml", cwd=tmp_path))
    assert data["steps"][0]["config"] == {"seed": 1, "n_pieces": 4, "seconds": 0.0}


def test_list(tmp_path: Path) -> None:
    text = call("list", cwd=tmp_path, program=[sys.executable, "-m", "galdist"])
    for name in ("simulate", "spectra", "r2unet-classifier"):
        assert name in text


def test_debug_stops_where_the_error_is(tmp_path: Path) -> None:
    """The exception itself comes out, for a debugger to catch."""
    write(tmp_path, "fail")
    done = subprocess.run(
        [*PROGRAM, "run", "study.yaml", "--site", "debug"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env=environment(),
    )
    assert "ValueError: snapshot.hdf5" in done.stderr
    assert "in fail" in done.stderr


def write_three(folder: Path) -> None:
    """Steps of two stages."""
    steps = [
        {"name": "a", "stage": "pieces"},
        {"name": "b", "stage": "one", "inputs": {"source": "a"}},
        {"name": "c", "stage": "pieces"},
    ]
    (folder / "study.yaml").write_text(yaml.safe_dump({"name": "study", "steps": steps}))


def done(folder: Path) -> set[str]:
    return {path.parent.name for path in (folder / "runs" / "study").glob("*/done.json")}


def test_only_some_steps(tmp_path: Path) -> None:
    write_three(tmp_path)
    call("run", "study.yaml", "--only", "a", "--only", "b", cwd=tmp_path)
    assert done(tmp_path) == {"a", "b"}


def test_only_the_steps_of_a_stage(tmp_path: Path) -> None:
    """A stage that this run does not have does not matter where another one is there."""
    write_three(tmp_path)
    call("run", "study.yaml", "--stage", "pieces", "--stage", "train", cwd=tmp_path)
    assert done(tmp_path) == {"a", "c"}
    text = call("run", "study.yaml", "--stage", "train", "--only", "a", cwd=tmp_path, status=2)
    assert "no step of this run has stage train" in text


def test_the_command_that_continues_says_all_again(tmp_path: Path) -> None:
    write(tmp_path, "fail")
    arguments = ("run", "study.yaml", "--set", "seed=2", "--only", "a", "--stage", "fail", "--out", "here")
    text = call(*arguments, "--from", "a", cwd=tmp_path, status=1)
    assert text.rstrip().endswith(f"continue with: galdist {' '.join(arguments)}"), "without --from"


def test_the_site_of_the_environment(tmp_path: Path) -> None:
    write(tmp_path)
    text = call("run", "study.yaml", cwd=tmp_path, status=2, GALDIST_SITE="nowhere")
    assert "nowhere: no such site" in text
    call("run", "study.yaml", "--site", "local", cwd=tmp_path, GALDIST_SITE="nowhere")


def test_the_run_worked_on_last(tmp_path: Path) -> None:
    write(tmp_path)
    for name in ("older", "newer"):
        call("run", "study.yaml", "--out", f"runs/{name}", cwd=tmp_path)
    assert "run: runs/newer\n" in call("status", cwd=tmp_path)
    call("run", "study.yaml", "--out", "runs/older", "--from", "b", cwd=tmp_path)
    for command in (["status"], ["logs", "a"]):
        assert "run: runs/older\n" in call(*command, cwd=tmp_path), command
    assert "run:" not in call("status", "runs/newer", cwd=tmp_path), "only where it was not named"


def test_a_run_of_a_cluster_on_a_machine_without_slurm(tmp_path: Path) -> None:
    """Whoever took the folder home can still look at it."""
    write(tmp_path)
    call("run", "study.yaml", cwd=tmp_path)
    (tmp_path / "runs/study/.orchestrator").mkdir()
    (tmp_path / "runs/study/.orchestrator/job.json").write_text('{"comment": "x", "id": "12"}')
    for command in ("status", "watch"):
        call(command, "runs/study", cwd=tmp_path, PATH=str(tmp_path))
    text = call("cancel", "runs/study", cwd=tmp_path, PATH=str(tmp_path), status=1)
    assert "is not on PATH: this machine has no Slurm" in text


def test_logs(tmp_path: Path) -> None:
    write(tmp_path, "fail-ddp")
    call("run", "study.yaml", cwd=tmp_path, status=1)
    assert "this is rank 0" in call("logs", "a", cwd=tmp_path)
    assert "this is rank 1" in call("logs", "runs/study/a", "--rank", "1", cwd=tmp_path)
    text = call("logs", "a", "--rank", "2", "--run", "runs/study", cwd=tmp_path, status=2)
    assert "log.2.txt: there is no such log; logs there: log.1.txt, log.txt" in text
    assert "log.txt: there is no such log; logs there: none" in call("logs", "b", cwd=tmp_path, status=2)
    assert "no such log" in call("logs", "b", "-f", cwd=tmp_path, status=2), "nobody works on it: no waiting"
    text = call("logs", "aa", cwd=tmp_path, status=2)
    assert "runs/study: there is no step 'aa'; did you mean a?" in text


def test_logs_of_a_step_that_has_not_started(tmp_path: Path) -> None:
    write(tmp_path)
    with held(tmp_path) as run, started("logs", "b", "-f", cwd=tmp_path) as logs:
        assert logs.stdout is not None
        while "b: has not started yet" not in logs.stdout.readline():
            assert logs.poll() is None
        (tmp_path / "hold").unlink()
        text = logs.communicate(timeout=300)[0]
        assert logs.returncode == 0
        assert re.search(r"^--- \S+ b on \S+$", text, re.MULTILINE)
        assert run.wait(300) == 0


def test_cancel(tmp_path: Path) -> None:
    """What Ctrl-C does, from another terminal."""
    write(tmp_path)
    with started("run", "study.yaml", "--set", "a.seconds=60", cwd=tmp_path) as run:
        until(lambda: (tmp_path / "runs/study/a/.job/rank.0.json").exists())
        text = call("cancel", "runs/study", cwd=tmp_path)
        assert text == f"ended orchestrator: process {run.pid}\n"
        output = run.communicate(timeout=300)[0]
        assert run.returncode == 130
        assert "galdist: stopped in a. What is done is kept. Continue with:" in output
    lines = call("status", "runs/study", cwd=tmp_path).splitlines()
    assert lines[0] == "runs/study: nobody works here"
    assert lines[2].split()[:3] == ["a", "pieces", "stopped"]
    assert call("cancel", "runs/study", cwd=tmp_path) == "runs/study: nothing runs and nothing waits\n"


def test_cancel_a_step(tmp_path: Path) -> None:
    write(tmp_path)
    with started("run", "study.yaml", "--set", "a.seconds=60", cwd=tmp_path) as run:
        until(lambda: (tmp_path / "runs/study/a/.job/rank.0.json").exists())
        text = call("cancel", "runs/study", "b", cwd=tmp_path)
        assert text == "runs/study: nothing runs and nothing waits\n"
        assert "did you mean a?" in call("cancel", "runs/study", "aa", cwd=tmp_path, status=2)
        assert "ended a: pid" in call("cancel", "runs/study", "a", cwd=tmp_path)
        assert "step a failed" in run.communicate(timeout=300)[0]


def test_watch(tmp_path: Path) -> None:
    """Without a terminal: lines, until all is over."""
    write(tmp_path)
    with held(tmp_path) as run:
        text = call("watch", "--once", cwd=tmp_path)
        assert "study: 0 of 2 steps, 1 running" in text
        with started("watch", "runs/study", cwd=tmp_path) as watching:
            assert watching.stdout is not None
            while not re.search(r"a  starts \(pieces\)", watching.stdout.readline()):
                assert watching.poll() is None
            (tmp_path / "hold").unlink()
            text = watching.communicate(timeout=300)[0]
            assert watching.returncode == 0
        assert re.search(r"b  done in \d", text)
        assert run.wait(300) == 0
    assert "study: 2 of 2 steps" in call("watch", "--once", cwd=tmp_path)
    assert "nobody works" not in call("watch", cwd=tmp_path)


def test_watch_on_a_terminal(tmp_path: Path) -> None:
    """A table that is drawn again and again in its place."""
    write(tmp_path)
    with held(tmp_path) as run:
        ours, theirs = pty.openpty()
        variables = environment(TERM="xterm-256color", COLUMNS="80", LINES="24")
        watching = subprocess.Popen([*PROGRAM, "watch"], cwd=tmp_path, stdout=theirs, env=variables)
        os.close(theirs)
        drawn, text = b"", ""
        with contextlib.suppress(OSError):  # the terminal is gone with its last user
            while data := os.read(ours, 65536):
                drawn += data
                text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", drawn.decode(errors="ignore"))
                if "1 running" in text:
                    (tmp_path / "hold").unlink(missing_ok=True)
        os.close(ours)
        assert watching.wait(300) == 0
        assert run.wait(300) == 0
    assert re.search(r"● a +━+", text)
    assert re.search(r"\d+% +0:\d\d", text)
    assert "study: 0 of 2 steps, 1 running" in text
    assert text.rstrip().endswith("study: 2 of 2 steps")
    assert b"\x1b[1A" in drawn, "lines are overwritten"


def test_the_end_of_watching_is_not_the_end_of_the_run(tmp_path: Path) -> None:
    write(tmp_path)
    with started("run", "study.yaml", "--set", "a.seconds=60", cwd=tmp_path) as run:
        until(lambda: (tmp_path / "runs/study/a/.job/rank.0.json").exists())
        with started("watch", cwd=tmp_path) as watching:
            assert watching.stdout is not None
            while "starts" not in watching.stdout.readline():
                assert watching.poll() is None
            watching.send_signal(signal.SIGINT)
            assert "no longer watched; the run goes on" in watching.communicate(timeout=300)[0]
            assert watching.returncode == 0
        run.send_signal(signal.SIGINT)
        run.communicate(timeout=300)
    text = call("watch", cwd=tmp_path)
    assert "a  stopped" in text
    assert "nobody works on it now" in text


def test_tensorboard(tmp_path: Path) -> None:
    write(tmp_path)
    call("run", "study.yaml", cwd=tmp_path)
    assert "no step has curves yet" in call("tensorboard", cwd=tmp_path, status=2)
    # What `torch.utils.tensorboard` would write, without its import of torch.
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    def add_curve(step: str) -> None:
        writer = EventFileWriter(str(tmp_path / "runs/study" / step / "tensorboard"))
        summary = Summary(value=[Summary.Value(tag="train/loss", simple_value=1.0)])
        writer.add_event(Event(wall_time=time.time(), step=1, summary=summary))
        writer.close()

    add_curve("a")
    with started("tensorboard", cwd=tmp_path) as server:
        assert server.stdout is not None
        lines = [server.stdout.readline() for _ in range(4)]
        address = lines[1].strip()
        match = re.fullmatch(r"http://127\.0\.0\.1:(\d+)/", address)
        assert match, lines
        assert f"ssh -N -L {match[1]}:127.0.0.1:{match[1]}" in lines[2]

        def runs() -> str:
            with urllib.request.urlopen(f"{address}data/runs", timeout=60) as answer:
                return str(answer.read().decode())

        until(lambda: runs() == '["a"]')
        add_curve("b")
        until(lambda: runs() == '["a", "b"]')
        taken = call("tensorboard", "--port", match[1], cwd=tmp_path, status=2)
        assert "--port: " in taken
        assert match[1] in taken
        server.terminate()
        assert server.wait(300) == 0


def test_site_check(tmp_path: Path) -> None:
    text = call("site", "check", "debug", cwd=tmp_path)
    assert text.startswith("ok      launcher: ")
    (tmp_path / "s.yaml").write_text("launcher: slurm\npartition: none\n")
    text = call("site", "check", "s.yaml", cwd=tmp_path, status=1, PATH=str(tmp_path))
    assert re.search(r"^FAILED  .*\n        mend: \S", text, re.MULTILINE)


def test_completion_offers_experiments() -> None:
    from galdist.cli import _experiment_names

    assert "quickstart" in _experiment_names("qu")
    assert _experiment_names("zz") == []
