"""Jobs: what ranks see, how they end, what is said of it, and that nothing stays behind."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from hpc import durable, launch, rank, ranks
from hpc.launch import Outcome
from hpc.resources import Resources
from hpc.site import Site
from hpc.strict import SettingsError

HERE = "test_launch"


# What the jobs run.


def write_environment(out: str) -> None:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "HPC_WORLD_SIZE")
    seen = {name: os.environ.get(name) for name in (*names, "OMP_NUM_THREADS", "HPC_PROGRESS")}
    durable.write_json(Path(out) / f"seen-{os.environ.get('RANK', '0')}.json", seen)


def write_world(out: str) -> None:
    from hpc import mpi

    world = mpi.world()
    total = world.allreduce(world.rank + 1)
    listening = [
        connection.laddr.ip
        for connection in psutil.Process().net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    durable.write_json(Path(out) / f"world-{world.rank}.json", [world.size, total, listening])
    world.barrier()


def allocate(megabytes: int) -> None:
    block = bytearray(megabytes * 10**6)
    block[::4096] = b"x" * len(block[::4096])


def allocate_below(megabytes: int) -> None:
    code = (
        f"import time; b = bytearray({megabytes * 10**6}); b[::4096] = b'x' * len(b[::4096]); time.sleep(3)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def fill(out: str) -> None:
    """Leave no room on a disk, not for one more file."""
    with open(Path(out) / "all", "ab", buffering=0) as stream:
        while True:
            stream.write(b"x" * 4096)


def sleep_with_children(n: int = 2) -> None:
    """Sleeps, as do children of its own, one of them cut loose from the process group."""
    for number in range(n):
        subprocess.Popen(
            [sys.executable, "-c", "import time; time.sleep(300)"], start_new_session=number % 2 == 1
        )
    time.sleep(300)


def ignore_signals(out: str) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    (Path(out) / "ready-0").touch()
    time.sleep(300)


def save_at_the_end(out: str) -> None:
    def save(number: int, frame: object) -> None:
        durable.write_text(Path(out) / f"saved-{os.environ['RANK']}.txt", "saved")
        sys.exit(0)

    signal.signal(signal.SIGTERM, save)
    (Path(out) / f"ready-{os.environ['RANK']}").touch()
    time.sleep(300)


def mpi_wait(out: str, dead: int) -> None:
    """Rank ``dead`` waits outside, the others in a barrier, busy in C."""
    from hpc import mpi

    world = mpi.world()
    (Path(out) / f"ready-{world.rank}").touch()
    if world.rank != dead:
        world.barrier()
    time.sleep(300)


def mpi_fail(dead: int) -> None:
    from hpc import mpi

    world = mpi.world()
    world.barrier()
    if world.rank == dead:
        raise ValueError("groups_090.hdf5: GroupPos is missing")
    world.barrier()


# Helpers.


def submit(
    function: str,
    arguments: dict[str, Any],
    folder: Path,
    runtime: launch.Runtime = "serial",
    resources: Resources | None = None,
    site: Site | None = None,
) -> launch.Job:
    task = launch.Task(f"{HERE}:{function}", arguments, folder, runtime, resources or Resources())
    return launch.submit(task, site)


def wait(job: launch.Job, timeout: float = 300) -> Outcome:
    deadline = time.monotonic() + timeout
    while (outcome := job.poll()) is None:
        assert time.monotonic() < deadline, "the job does not end"
        time.sleep(0.02)
    return outcome


def reports(folder: Path, n: int, timeout: float = 300) -> list[dict[str, Any]]:
    """What the ranks of a job said at their start, once all have."""
    deadline = time.monotonic() + timeout
    paths = [rank.report_path(folder, number) for number in range(n)]
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline, "the ranks do not start"
        time.sleep(0.02)
    return [durable.read_json(path) for path in paths]


def ready(folder: Path, n: int) -> None:
    """Wait until all ranks of a job have come to what the test is about."""
    assert until(lambda: len(list(folder.glob("ready-*"))) == n)


def of_job(token: str) -> list[psutil.Process]:
    return [process for process in psutil.process_iter() if rank._belongs(process, token)]


def token(folder: Path) -> str:
    return str(durable.read_json(folder / ".job" / "spec.json")["token"])


def until(condition: Any, timeout: float = 300) -> bool:
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


# What ranks see.


@pytest.mark.parametrize("runtime", ["serial", "dask"])
def test_one_process_that_knows_how_many_workers(runtime: launch.Runtime, tmp_path: Path) -> None:
    job = submit(
        "write_environment",
        {"out": str(tmp_path)},
        tmp_path,
        runtime,
        Resources(ranks=2),
        Site(cpus=8),
    )
    assert wait(job).describe() == "done"
    seen = durable.read_json(tmp_path / "seen-0.json")
    assert (seen["HPC_WORLD_SIZE"], seen["OMP_NUM_THREADS"]) == ("2", "4")
    assert seen["HPC_PROGRESS"] == str(tmp_path / "progress.json")


def test_ddp_ranks(tmp_path: Path) -> None:
    job = submit(
        "write_environment", {"out": str(tmp_path)}, tmp_path, "ddp", Resources(ranks=3), Site(cpus=6)
    )
    assert wait(job).describe() == "done"
    seen = [durable.read_json(tmp_path / f"seen-{number}.json") for number in range(3)]
    assert [s["RANK"] for s in seen] == [s["LOCAL_RANK"] for s in seen] == ["0", "1", "2"]
    assert {(s["WORLD_SIZE"], s["HPC_WORLD_SIZE"], s["OMP_NUM_THREADS"]) for s in seen} == {("3", "3", "2")}
    assert {s["MASTER_ADDR"] for s in seen} == {"127.0.0.1"}
    assert len({s["MASTER_PORT"] for s in seen}) == 1
    assert [s["HPC_PROGRESS"] is None for s in seen] == [False, True, True], "rank 0 alone reports"


def test_cores_of_a_rank_are_its_threads(tmp_path: Path) -> None:
    resources = Resources(ranks=2, cpus=3)
    job = submit("write_environment", {"out": str(tmp_path)}, tmp_path, "ddp", resources, Site(cpus=64))
    wait(job)
    assert durable.read_json(tmp_path / "seen-1.json")["OMP_NUM_THREADS"] == "3"


@pytest.mark.parametrize("n", [1, 2, 4])
def test_mpi_ranks(n: int, tmp_path: Path) -> None:
    pytest.importorskip("mpi4py")
    job = submit("write_world", {"out": str(tmp_path)}, tmp_path, "mpi", Resources(ranks=n), Site(cpus=4))
    assert wait(job).describe() == "done"
    for number in range(n):
        size, total, listening = durable.read_json(tmp_path / f"world-{number}.json")
        assert (size, total) == (n, n * (n + 1) // 2)
        assert set(listening) <= {"127.0.0.1", "::1"}, "only this machine reaches the ranks"


def test_debug_runs_in_this_process(tmp_path: Path) -> None:
    before = dict(os.environ)
    job = submit("write_environment", {"out": str(tmp_path)}, tmp_path, "ddp", site=Site(launcher="debug"))
    assert job.poll() == Outcome(hosts=(rank.identity()["host"],))
    assert durable.read_json(tmp_path / "seen-0.json")["HPC_WORLD_SIZE"] == "1"
    assert dict(os.environ) == before
    with pytest.raises(ValueError, match="PartType1"):
        submit("fail", {"how": "raise", "on": 0}, tmp_path, site=Site(launcher="debug"))


def test_environment_of_the_site(tmp_path: Path) -> None:
    site = Site(environment={"OMP_NUM_THREADS": "11"})
    wait(submit("write_environment", {"out": str(tmp_path)}, tmp_path, site=site))
    assert durable.read_json(tmp_path / "seen-0.json")["OMP_NUM_THREADS"] == "11"


def test_peak_memory_of_every_process(tmp_path: Path) -> None:
    outcome = wait(submit("allocate", {"megabytes": 200}, tmp_path / "own"))
    assert 200e6 < outcome.peak_memory["rank 0"] < 300e6
    outcome = wait(submit("allocate_below", {"megabytes": 200}, tmp_path / "below"))
    assert outcome.peak_memory["rank 0"] < 100e6
    assert 200e6 < outcome.peak_memory["rank 0 process 1"] < 300e6


# How ranks end.


def fail(how: str, on: int) -> None:
    import small_stages

    small_stages.fail(small_stages.FailConfig(how=how, rank=on), {}, Path())


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("raise", "ValueError: snapshot.hdf5: PartType1/Coordinates is missing"),
        ("exit", "SystemExit: 7"),
        ("segfault", "killed by signal 11 (SIGSEGV)"),
        ("unraisable", "ended with exit code 3"),
    ],
)
def test_a_rank_that_fails_ends_the_others_and_is_named(how: str, said: str, tmp_path: Path) -> None:
    job = submit("fail", {"how": how, "on": 1}, tmp_path, "ddp", Resources(ranks=2), Site(cpus=2))
    outcome = wait(job)
    assert time.time() - reports(tmp_path, 2)[1]["ended"] < 15, "the other rank would sleep for a minute"
    assert str(outcome.failures[0]) == f"rank 1: {said}"
    assert "| this is rank 1" in outcome.describe(), "its own log is shown"
    assert "this is rank 0" not in outcome.describe()
    assert of_job(token(tmp_path)) == []


@pytest.fixture
def small_group() -> Iterator[Path]:
    """A control group whose processes have 150 MB together."""
    memory = Path("/sys/fs/cgroup/memory")  # version 1
    group = (memory if memory.exists() else Path("/sys/fs/cgroup")) / f"galdist-test-{os.getpid()}"
    try:
        group.mkdir()
        limit = group / ("memory.limit_in_bytes" if memory.exists() else "memory.max")
        limit.write_text("150000000")
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    try:
        yield group
    finally:
        until(lambda: not (group / "cgroup.procs").read_text())
        group.rmdir()


def test_a_rank_that_the_system_kills_for_its_memory(small_group: Path, tmp_path: Path) -> None:
    code = f"from pathlib import Path; Path({str(small_group / 'cgroup.procs')!r}).write_text('0')\n"
    code += ORCHESTRATOR.format(
        path=sys.path,
        function=f"{HERE}:allocate",
        arguments={"megabytes": 500},
        folder=str(tmp_path),
        runtime="serial",
    ).replace("    job.poll()", "    if outcome := job.poll(): sys.exit(outcome.describe())")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "was killed by the system when the job's memory ran out; ask for more" in done.stderr


def test_a_report_on_a_full_disk(tmp_path: Path) -> None:
    """What became of a rank is told all the same."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]).returncode:
        pytest.skip("no small disk can be mounted here")
    try:
        outcome = wait(submit("fill", {"out": str(disk)}, disk / "step"))
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
    assert str(outcome.failures[0]) == "OSError: [Errno 28] No space left on device"


def test_one_rank_has_no_number(tmp_path: Path) -> None:
    outcome = wait(submit("fail", {"how": "raise", "on": 0}, tmp_path))
    assert str(outcome.failures[0]).startswith("ValueError: snapshot.hdf5")
    assert "hpc/rank.py" not in outcome.describe(), "the traceback begins with the job's own code"


@pytest.mark.parametrize("which", ["child", "pid"])
def test_a_killed_mpi_rank_ends_the_others(which: str, tmp_path: Path) -> None:
    """Whichever of a rank's two processes it hits."""
    pytest.importorskip("mpi4py")
    job = submit("mpi_wait", {"out": str(tmp_path), "dead": 1}, tmp_path, "mpi", Resources(ranks=2), Site())
    ready(tmp_path, 2)
    ranks = reports(tmp_path, 2)
    os.kill(ranks[1][which], signal.SIGKILL)
    started = time.monotonic()
    outcome = wait(job)
    assert time.monotonic() - started < 10
    if which == "child":
        assert str(outcome.failures[0]).startswith("rank 1: killed by signal 9 (SIGKILL")
    else:
        assert "rank 1: was killed" in [str(failure) for failure in outcome.failures]
    assert of_job(token(tmp_path)) == []


def test_an_mpi_rank_that_raises_is_named(tmp_path: Path) -> None:
    pytest.importorskip("mpi4py")
    job = submit("mpi_fail", {"dead": 1}, tmp_path, "mpi", Resources(ranks=2), Site())
    assert str(wait(job).failures[0]) == "rank 1: ValueError: groups_090.hdf5: GroupPos is missing"


def test_a_launcher_that_starts_nothing(tmp_path: Path) -> None:
    broken = tmp_path / "mpirun"
    broken.write_text("#!/bin/sh\necho no slots available\nexit 4\n")
    broken.chmod(0o755)
    job = submit("mpi_fail", {"dead": 1}, tmp_path, "mpi", Resources(ranks=2), Site(mpirun=broken))
    outcome = wait(job)
    assert str(outcome.failures[0]) == "mpirun: ended with exit code 4 before it started the ranks"
    assert "| no slots available" in outcome.describe()


@pytest.mark.skipif(sys.platform != "linux", reason="needs a launcher of another kind of MPI")
def test_ranks_that_do_not_know_their_number(tmp_path: Path) -> None:
    """A launcher whose ranks would all believe to be rank 0 of 1."""
    foreign = tmp_path / "mpirun"
    foreign.write_text('#!/bin/sh\nshift 2\n"$@" & "$@"; wait $!\n')
    foreign.chmod(0o755)
    job = submit("mpi_fail", {"dead": 1}, tmp_path, "mpi", Resources(ranks=2), Site(mpirun=foreign))
    outcome = wait(job)
    assert "unknown kind of MPI" in outcome.describe()


# How jobs are ended.


@pytest.mark.parametrize("runtime", ["serial", "mpi"])
def test_cancel_ends_every_process(runtime: launch.Runtime, tmp_path: Path) -> None:
    job = submit("sleep_with_children", {}, tmp_path, runtime, Resources(ranks=2), Site())
    n_ranks = 1 if runtime == "serial" else 2
    assert until(lambda: len(of_job(token(tmp_path))) >= n_ranks * 4)
    job.cancel()
    assert of_job(token(tmp_path)) == []


def test_cancel_lets_ranks_save(tmp_path: Path) -> None:
    job = submit("save_at_the_end", {"out": str(tmp_path)}, tmp_path, "ddp", Resources(ranks=2))
    ready(tmp_path, 2)
    job.cancel()
    assert [(tmp_path / f"saved-{number}.txt").exists() for number in range(2)] == [True, True]


def test_cancel_kills_what_does_not_listen(tmp_path: Path) -> None:
    job = submit("ignore_signals", {"out": str(tmp_path)}, tmp_path)
    ready(tmp_path, 1)
    job.cancel(grace=0.5)
    assert of_job(token(tmp_path)) == []


ORCHESTRATOR = """
import sys, time
sys.path[:0] = {path!r}
from pathlib import Path
from hpc import launch
from hpc.resources import Resources
task = launch.Task({function!r}, {arguments!r}, Path({folder!r}), {runtime!r}, Resources(ranks=2))
job = launch.submit(task)
while True:
    job.poll()
    time.sleep(0.05)
"""


def orchestrate(
    function: str, arguments: dict[str, Any], folder: Path, runtime: str
) -> subprocess.Popen[bytes]:
    code = ORCHESTRATOR.format(
        path=sys.path, function=function, arguments=arguments, folder=str(folder), runtime=runtime
    )
    return subprocess.Popen([sys.executable, "-c", code])


@pytest.mark.parametrize(("runtime", "n_processes"), [("serial", 4), ("ddp", 8), ("mpi", 4)])
def test_a_killed_orchestrator_takes_its_job_along(runtime: str, n_processes: int, tmp_path: Path) -> None:
    """The ranks of MPI wait in C, the others with children of their own."""
    function, arguments = "sleep_with_children", {}
    if runtime == "mpi":
        function, arguments = "mpi_wait", {"out": str(tmp_path), "dead": 1}
    orchestrator = orchestrate(f"{HERE}:{function}", arguments, tmp_path, runtime)
    try:
        reports(tmp_path, 1 if runtime == "serial" else 2)
        if runtime == "mpi":
            ready(tmp_path, 2)
        assert until(lambda: len(of_job(token(tmp_path))) >= n_processes)
    finally:
        orchestrator.kill()  # and it is not waited for: a zombie is dead too
    assert until(lambda: of_job(token(tmp_path)) == [], timeout=15)
    orchestrator.wait()


def test_leftovers_are_ended_before_a_new_job(tmp_path: Path) -> None:
    """Supervisors that cannot act (stopped here) do not keep the next job from its folder."""
    orchestrator = orchestrate(f"{HERE}:sleep_with_children", {}, tmp_path, "serial")
    supervisor = psutil.Process(reports(tmp_path, 1)[0]["pid"])
    supervisor.suspend()
    orchestrator.kill()
    orchestrator.wait()
    old = token(tmp_path)
    assert of_job(old)
    wait(submit("write_environment", {"out": str(tmp_path)}, tmp_path))
    assert of_job(old) == []


def test_ports_are_free_and_below_the_ephemeral_range() -> None:
    port = ranks.free_port()
    assert 20000 <= port < 32000
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))


def test_a_process_is_known_when_the_clock_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    me = rank.identity()
    monkeypatch.setattr(psutil.Process, "create_time", lambda process: 0.0)  # it follows the clock
    assert rank.is_alive(me)
    assert not rank.is_alive(me | {"created": me["created"] + 1}), "another process with its number"


def test_a_host_that_does_not_know_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "no-such-host.invalid")
    with pytest.raises(
        SettingsError, match=r"no-such-host\.invalid does not know the address of its own name"
    ):
        ranks.address_of(None)
