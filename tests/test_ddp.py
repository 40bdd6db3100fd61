"""The process group, alone and with real ranks; requests to stop."""

import datetime
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch
from torch import nn

from hpc import ddp
from hpc.ranks import free_port


@contextmanager
def ranks(code: str, n_ranks: int, **variables: str) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that run ``code`` as the ranks of a group; none is left afterwards."""
    base = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    base |= {"WORLD_SIZE": str(n_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=base | {"RANK": str(rank)} | variables,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(n_ranks)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def succeed(processes: list[subprocess.Popen[str]]) -> None:
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors


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


def test_ranks_reduce_and_average_gradients_on_loopback() -> None:
    with ranks(_RANKS, 3) as processes:
        succeed(processes)


_LEAVE = """
import os
import torch
from torch import nn
from hpc import ddp

def work(group):
    wrapped = group.wrap(nn.Linear(3, 1))
    wrapped(torch.ones(1, 3)).sum().backward()
    if os.environ["LEAVE"] == "stopped":
        raise ddp.Stopped(15)

try:
    with ddp.group() as group:
        work(group)
except ddp.Stopped:
    pass
threads = [open(f"/proc/self/task/{task}/comm").read().strip() for task in os.listdir("/proc/self/task")]
assert not [name for name in threads if "gloo" in name or "store" in name], threads
"""


@pytest.mark.skipif(sys.platform != "linux", reason="threads are read from /proc")
@pytest.mark.parametrize("leave", ["done", "stopped"])
def test_no_thread_outlives_the_group(leave: str) -> None:
    """One that does may let go of a tensor while the interpreter ends, which aborts the process."""
    with ranks(_LEAVE, 2, LEAVE=leave) as processes:
        succeed(processes)


_HANG = """
import os, signal, time
from pathlib import Path
import torch
import torch._dynamo  # which DDP imports when it is made
from torch import nn
from hpc import ddp
(Path(os.environ["READY"]) / os.environ["RANK"]).touch()
while len(os.listdir(os.environ["READY"])) < 3:  # the imports of one may take longer than all may wait
    time.sleep(0.01)
with ddp.group() as group:
    wrapped = group.wrap(nn.Linear(3, 1))
    steps = {{
        "vote": lambda: group.any(False),
        "sum": lambda: group.sum({{"loss": torch.ones(1)}}),
        "gradients": lambda: wrapped(torch.ones(1, 3)).sum().backward(),
    }}
    for _ in range(3):
        steps["{step}"]()
    if group.rank == 1:
        os.kill(os.getpid(), signal.{signal})
    for _ in range(3):
        steps["{step}"]()
"""


@pytest.mark.parametrize(
    ("step", "signum", "message"),
    [
        ("vote", "SIGSTOP", r"rank \d of 3 gave up a vote after \d\.\d s: Timed out waiting 3000ms"),
        ("gradients", "SIGSTOP", r"rank \d of 3 gave up averaging gradients: Timed out waiting 3000ms"),
        ("sum", "SIGKILL", r"rank \d of 3 gave up summing 'loss' after [012]\.\d s: "),
    ],
)
def test_a_rank_that_hangs_or_dies_is_told_of(step: str, signum: str, message: str, tmp_path: Path) -> None:
    code = _HANG.format(step=step, signal=signum)
    with ranks(code, 3, HPC_TIMEOUT="3", READY=str(tmp_path)) as processes:
        victim = psutil.Process(processes[1].pid)
        gone = (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE)
        while victim.status() not in gone:
            time.sleep(0.01)
        began = time.monotonic()
        errors = [processes[rank].communicate(timeout=300)[1] for rank in (0, 2)]
        assert time.monotonic() - began < 30
    said = [text.strip().splitlines()[-1] for text in errors]
    assert all("LostRank: rank" in line and "waiting for 3 s (HPC_TIMEOUT)" in line for line in said), said
    assert any(re.search(message, line) for line in said), said  # the other one may see it leave


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """Variables of the network that a group chooses; unset, and as before afterwards."""
    names = (
        "GLOO_SOCKET_IFNAME",
        "NCCL_SOCKET_IFNAME",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING",
        "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC",
    )
    for name in names:
        monkeypatch.setenv(name, "to be restored")
        monkeypatch.delenv(name)
    return names


_MEET = "from hpc import ddp\nwith ddp.group(): pass"


def test_a_rank_that_does_not_come_is_not_waited_for_for_ever() -> None:
    with ranks(_MEET, 2, HPC_TIMEOUT="2") as processes:
        processes[1].kill()
        _, errors = processes[0].communicate(timeout=300)
    assert re.search(r"LostRank: rank 0 of 2 gave up meeting the others at 127\.0\.0\.1:\d+ after \d", errors)


def test_two_ranks_meet_at_any_address_of_rank_0() -> None:
    with ranks(
        _RANKS.replace('"127.0.0.1", "::1"', '"127.0.0.1", "127.0.0.2"'), 2, MASTER_ADDR="127.0.0.2"
    ) as found:
        succeed(found)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"MASTER_ADDR": "192.0.2.1"}, "MASTER_ADDR"),  # of documentation, so of nobody
        ({"HPC_TIMEOUT": "soon"}, "HPC_TIMEOUT is 'soon', not the seconds"),
    ],
)
def test_what_the_launcher_got_wrong_is_said(
    variables: dict[str, str], message: str, network: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    for name, value in (given | variables).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message), ddp.group():
        pass


def test_network_follows_the_master_unless_the_launcher_chose(
    network: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    loopback = "lo" if sys.platform == "linux" else "lo0"
    assert ddp._interface("localhost") == (loopback, True)
    for name, addresses in psutil.net_if_addrs().items():
        for address in addresses:
            if address.family is socket.AF_INET and not address.address.startswith("127."):
                assert ddp._interface(address.address) == (name, False)
    timeout = datetime.timedelta(seconds=90)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    ddp._choose_network(timeout)
    assert [os.environ[name] for name in network] == [loopback, loopback, "3", "90"]
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    ddp._choose_network(timeout)
    assert os.environ["GLOO_SOCKET_IFNAME"] == "ib0"


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
