"""The command line: quick, clear, without tracebacks."""

import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

import galdist

PROGRAM = [sys.executable, str(Path(__file__).with_name("small_stages.py"))]
HEAVY = ("torch", "dask", "distributed", "zarr", "numpy", "h5py", "matplotlib", "mpi4py", "pandas")


def call(*arguments: str, cwd: Path, status: int | None = 0, program: list[str] = PROGRAM) -> str:
    """Both outputs of the command, which must end with ``status``."""
    path = os.pathsep.join([str(Path(galdist.__file__).parents[1]), str(Path(__file__).parent)])
    done = subprocess.run(
        [*program, *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "PYTHONPATH": path, "COLUMNS": "120"},
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
            started = time.perf_counter()
            call(cwd=tmp_path, program=program)
            times.append(time.perf_counter() - started)
        return min(times)

    parser = fastest([sys.executable, "-c", "import typer, rich.console, rich.table, rich.markdown"])
    assert fastest([sys.executable, "-m", "galdist", "--help"]) < 3 * parser + 0.1


def test_help_takes_less_than_half_a_second_of_a_core(tmp_path: Path) -> None:
    """User and system time, which other work on the machine changes little."""

    def used() -> float:
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return children.ru_utime + children.ru_stime

    times = []
    for _ in range(3):
        before = used()
        call(cwd=tmp_path, program=[sys.executable, "-m", "galdist", "--help"])
        times.append(used() - before)
    assert min(times) < 0.5


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
    assert "a  starts (pieces): new" in text
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


def test_a_pipe_is_written_line_by_line(tmp_path: Path) -> None:
    """What a step says is there before the run ends."""
    write(tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(Path(galdist.__file__).parents[1])}
    environment.pop("PYTHONUNBUFFERED", None)
    process = subprocess.Popen(
        [*PROGRAM, "run", "study.yaml", "--set", "a.seconds=3"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "starts (pieces)" in line:
            break
    assert process.poll() is None
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == 143


def test_a_failing_step(tmp_path: Path) -> None:
    write(tmp_path, "fail")
    text = call("run", "study.yaml", "--out", "here", cwd=tmp_path, status=1)
    assert "galdist: step a failed after 0:0" in text
    assert "ValueError: snapshot.hdf5: PartType1/Coordinates is missing" in text
    assert "last lines of here/a/log.txt" in text
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
        env={**os.environ, "PYTHONPATH": str(Path(galdist.__file__).parents[1])},
    )
    assert "ValueError: snapshot.hdf5" in done.stderr
    assert "in fail" in done.stderr


def test_completion_offers_experiments() -> None:
    from galdist.cli import _experiment_names

    assert "quickstart" in _experiment_names("qu")
    assert _experiment_names("zz") == []
