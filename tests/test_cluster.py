"""The Dask client: workers, their threads, where its servers listen, what is published."""

import os
import re
import signal
import socket
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from hpc import cluster, durable, mpi, progress, rank
from hpc.site import Site

LOOPBACK_INTERFACE = "lo" if sys.platform == "linux" else "lo0"


def identity(_: int) -> tuple[int, str | None]:
    return os.getpid(), os.environ.get("OMP_NUM_THREADS")


@pytest.fixture
def listening() -> Callable[[], set[str]]:
    """Addresses on which this process, and those of its children that the test started, listen."""
    me = psutil.Process()
    others = set(me.children(recursive=True))

    def found() -> set[str]:
        return {
            connection.laddr.ip
            for process in (me, *(set(me.children(recursive=True)) - others))
            for connection in process.net_connections("tcp")
            if connection.status == psutil.CONN_LISTEN
        }

    return found


@pytest.mark.parametrize("n_workers", [1, 2])
def test_as_many_workers_as_the_launcher_asked_for(
    n_workers: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    listening: Callable[[], set[str]],
) -> None:
    monkeypatch.setenv(mpi.VARIABLE, str(n_workers))
    monkeypatch.setenv(progress.VARIABLE, str(tmp_path / "progress.json"))
    with cluster.client(memory=2 * 2**30) as client:
        workers = client.scheduler_info()["workers"].values()
        assert [worker["nthreads"] for worker in workers] == [1] * n_workers
        assert [worker["memory_limit"] for worker in workers] == [2 * 2**30] * n_workers
        assert listening() <= {"127.0.0.1", "::1"}
        link = durable.read_json(tmp_path / "progress.json")["links"]["dashboard"]
        assert urllib.request.urlopen(link, timeout=10).status == 200
        seen = client.gather(client.map(identity, range(8), pure=False))
    if n_workers == 1:
        assert {pid for pid, _ in seen} == {os.getpid()}, "one worker can be debugged in this process"
    else:
        assert {threads for _, threads in seen} == {"1"}
        assert os.getpid() not in {pid for pid, _ in seen}
        assert not any(psutil.pid_exists(pid) for pid, _ in seen), "workers end with the block"


def test_a_killed_worker_is_replaced() -> None:
    with cluster.client(2, memory=2 * 2**30) as client:
        before = set(client.run(os.getpid).values())
        os.kill(min(before), signal.SIGKILL)
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            now = set(client.run(os.getpid, on_error="ignore").values())
            if len(now) == 2 and now != before:
                break
            time.sleep(0.1)
        assert len(now) == 2
        assert min(before) not in now


def test_workers_of_this_machine_take_no_tasks_from_others() -> None:
    with cluster.client(2, memory=2 * 2**30) as client:
        addresses = [client.scheduler.address, *client.scheduler_info()["workers"]]
        for address in addresses:
            assert address.startswith("tls://127.0.0.1:")
            with pytest.raises(ssl.SSLError, match="CERTIFICATE_REQUIRED"):
                talk(int(address.rpartition(":")[2]), None)


def test_memory_of_the_node_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cluster.MEMORY_VARIABLE, str(4 * 2**30))
    with cluster.client(2) as client:
        limits = {worker["memory_limit"] for worker in client.scheduler_info()["workers"].values()}
    assert limits == {2 * 2**30}


def test_no_workers() -> None:
    with pytest.raises(ValueError, match="at least one worker, got 0"), cluster.client(0):
        pass


def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int = 2, **facts: Any) -> Any:
    """A cluster of worker jobs before the first of them is queued: Slurm is not asked."""
    monkeypatch.setenv(rank.JOB_VARIABLE, "token")
    logs = tmp_path / "my step" / ".slurm" / "workers"
    logs.mkdir(parents=True)
    site = Site.model_validate({"launcher": "slurm", "interface": LOOPBACK_INTERFACE, **facts})
    return cluster._job_cluster(processes, 2**30, site.scratch, site, logs)


def status(link: str) -> int:
    try:
        return int(urllib.request.urlopen(link, timeout=10).status)
    except urllib.error.HTTPError as error:
        return error.code


def talk(port: int, security: Any) -> None:
    """Speak TLS to a server with another certificate than its own, or none, whoever it is."""
    context = ssl.create_default_context()
    if security is not None:
        context = security.get_connection_args("client")["ssl_context"]
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with context.wrap_socket(socket.create_connection(("127.0.0.1", port), timeout=10)) as connection:
        connection.recv(1)


def test_script_of_a_worker_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {
        "partition": "long",
        "gpu": {"partition": "gpu"},
        "account": "astro",
        "qos": "normal",
        "constraint": "ib",
        "directives": ["--reservation=x"],
        "setup": ["module load python"],
        "environment": {"GREETING": "a b"},
        "container": {"image": "/images/a b.sif", "options": ["--bind=/data"]},
        "scratch": "$TMPDIR/dask",
        "time": "90 min",
    }
    with jobs(tmp_path, monkeypatch, **facts) as made:
        script = made.job_script()
    header = [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH")]
    assert header == [
        "--job-name=galdist-dask-token",
        "--comment=token",
        f'--output="{tmp_path}/my step/.slurm/workers/%j.out"',
        "--partition=long",
        "--account=astro",
        "--qos=normal",
        "--constraint=ib",
        "--nodes=1",
        "--ntasks=1",
        "--cpus-per-task=2",
        "--mem=2048M",
        "--time=90",
        "--no-requeue",
        "--reservation=x",
    ]
    lines = script.splitlines()
    assert lines.index("module load python") < lines.index("export GREETING='a b'") < len(lines) - 1
    assert "export NUMBA_NUM_THREADS=1" in lines
    worker = lines[-1]
    inside = "apptainer exec --bind=/data '/images/a b.sif' python -P -m distributed.cli.dask_worker tls://127.0.0.1:"
    assert worker.startswith(inside)
    assert '--local-directory "$TMPDIR/dask"' in worker, "the node's variable"
    assert "--nworkers 2" in worker
    assert f"--memory-limit {2**30} " in worker
    assert "--death-timeout 60" in worker


def test_directives_that_a_site_rejects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cluster.TIME_VARIABLE, "61")
    with jobs(tmp_path, monkeypatch, skip_directives=["--mem", "--comment"]) as made:
        script = made.job_script()
    assert "--mem=" not in script
    assert "--comment" not in script
    assert "#SBATCH --time=2\n" in script, "rounded up to minutes"
    assert f"--memory-limit {2**30} " in script, "Dask keeps to it all the same"


def test_strangers_are_kept_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listening: Callable[[], set[str]]
) -> None:
    """Who has no key cannot talk to the scheduler; who does not know its path cannot read the dashboard."""
    from distributed import Client
    from distributed.security import Security

    with jobs(tmp_path, monkeypatch) as made:
        assert made.scheduler_address.startswith("tls://127.0.0.1:")
        folder = tmp_path / "my step" / ".slurm" / "tls"
        assert folder.stat().st_mode & 0o777 == 0o700
        port = int(made.scheduler_address.rpartition(":")[2])
        for certificate in (None, Security.temporary()):
            with pytest.raises(ssl.SSLError, match=r"CERTIFICATE_REQUIRED|UNKNOWN_CA"):
                talk(port, certificate)
        with Client(made, timeout=10) as friend:
            assert friend.scheduler_info()["workers"] == {}
        assert listening() <= {"127.0.0.1", "::1"}
        link = made.dashboard_link
        root, path = re.fullmatch(r"(http://127\.0\.0\.1:\d+)(/[\w-]{22})/status", link).groups()
        assert status(link) == 200
        assert status(f"{root}{path}/statics/css/base.css") == 200, "its parts have the same path"
        guesses = [
            "",
            "/",
            "/status",
            "/sitemap.json",
            "/health",
            "/metrics",
            "/json/counts.json",
            f"{path}x/status",
        ]
        assert {status(root + guess) for guess in guesses} == {404}
    assert not folder.exists()


def test_jobs_share_workers_evenly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cluster.SITE_VARIABLE, Site(launcher="slurm").model_dump_json())
    monkeypatch.setenv(cluster.NODES_VARIABLE, "2")
    with pytest.raises(ValueError, match="2 worker jobs cannot share 3 workers evenly"), cluster.client(3):
        pass
