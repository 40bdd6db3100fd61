"""The Dask client: workers, their threads, where its servers listen, what is published."""

import os
import signal
import time
import urllib.request
from pathlib import Path

import psutil
import pytest

from hpc import cluster, durable, mpi, progress


def identity(_: int) -> tuple[int, str | None]:
    return os.getpid(), os.environ.get("OMP_NUM_THREADS")


def listening() -> set[str]:
    """Addresses on which this process and its children listen."""
    me = psutil.Process()
    return {
        connection.laddr.ip
        for process in (me, *me.children(recursive=True))
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }


@pytest.mark.parametrize("n_workers", [1, 2])
def test_as_many_workers_as_the_launcher_asked_for(
    n_workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            now = set(client.run(os.getpid, on_error="ignore").values())
            if len(now) == 2 and now != before:
                break
            time.sleep(0.1)
        assert len(now) == 2
        assert min(before) not in now


def test_memory_of_the_node_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cluster.MEMORY_VARIABLE, str(4 * 2**30))
    with cluster.client(2) as client:
        limits = {worker["memory_limit"] for worker in client.scheduler_info()["workers"].values()}
    assert limits == {2 * 2**30}


def test_no_workers() -> None:
    with pytest.raises(ValueError, match="at least one worker, got 0"), cluster.client(0):
        pass
