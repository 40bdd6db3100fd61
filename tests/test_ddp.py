"""The process group, alone and with real ranks; requests to stop."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from small_grids import free_port
from torch import nn

from hpc import ddp


def test_one_process_is_a_group_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with ddp.group() as group:
        assert (group.rank, group.world_size, group.is_main) == (0, 1, True)
        values = {"a": torch.tensor(3.0)}
        summed = group.sum(values)
        summed["a"] += 1
        assert values["a"] == 3  # a copy
        assert group.mean(values)["a"] == 3
        assert group.any(False, True) == (False, True)
        assert group.gather("x") == ["x"]
        assert group.broadcast({"y": 1}) == {"y": 1}
        module = nn.Linear(2, 2)
        assert group.wrap(module) is module
        with group.accumulating(module):
            pass
        group.barrier()


_RANKS = """
import psutil
import torch
from torch import nn
from hpc import ddp
with ddp.group() as group:
    n, rank = group.world_size, group.rank
    sums = group.sum({"float": torch.tensor([1.0, rank]), "long": torch.tensor(rank, dtype=torch.int64)})
    assert sums["float"].tolist() == [n, n * (n - 1) / 2] and sums["long"].item() == n * (n - 1) // 2
    assert group.mean({"x": torch.tensor(float(rank))})["x"] == (n - 1) / 2
    assert group.any(rank == n - 1, False) == (True, False)
    assert group.gather({"rank": rank}) == [{"rank": r} for r in range(n)]
    assert group.broadcast("of rank " + str(rank)) == "of rank 0"
    torch.manual_seed(rank)
    module = nn.Linear(3, 1, bias=False)
    module.register_buffer("constant", torch.tensor(float(rank)))
    wrapped = group.wrap(module)
    assert all(torch.equal(weight, module.weight) for weight in group.gather(module.weight.detach()))
    assert module.constant == 0
    x = torch.full((1, 3), float(rank + 1))
    with group.accumulating(wrapped):
        wrapped(x).sum().backward()
    assert torch.equal(module.weight.grad, x)  # not shared yet
    wrapped(x).sum().backward()
    torch.testing.assert_close(module.weight.grad, torch.full((1, 3), float(n + 1)))  # mean of 2 (rank + 1)
    group.barrier()
    listening = [
        connection.laddr.ip
        for connection in psutil.Process().net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert listening and set(listening) <= {"127.0.0.1", "::1"}, listening
    del wrapped  # before the group it belongs to
"""


@pytest.mark.parametrize("n_ranks", [2, 3])
def test_ranks_reduce_and_average_gradients_on_loopback(n_ranks: int) -> None:
    port = str(free_port())
    base = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", _RANKS],
            env=base
            | {"RANK": str(r), "WORLD_SIZE": str(n_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
            stderr=subprocess.PIPE,
            text=True,
        )
        for r in range(n_ranks)
    ]
    try:
        for rank in ranks:
            _, errors = rank.communicate(timeout=120)
            assert rank.returncode == 0, errors
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


def test_an_incomplete_launch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    with pytest.raises(ValueError, match="MASTER_ADDR, MASTER_PORT is not set"), ddp.group():
        pass


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_signals_become_requests_and_handlers_come_back(signum: signal.Signals) -> None:
    before = signal.getsignal(signum)
    with ddp.stop_requests() as request:
        assert not request
        os.kill(os.getpid(), signum)
        assert request
        assert request.signum == signum
    assert signal.getsignal(signum) is before
    assert ddp.Stopped(request.signum).code == 128 + signum


def test_threads_have_no_signals_and_are_never_asked() -> None:
    seen = []

    def work() -> None:
        with ddp.stop_requests() as request:
            seen.append(bool(request))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]


@pytest.mark.parametrize(
    ("address", "expected"), [("127.0.0.1", True), ("localhost", True), ("::1", True), ("node7", False)]
)
def test_loopback_is_recognized(address: str, expected: bool) -> None:
    assert ddp._is_loopback(address) is expected
