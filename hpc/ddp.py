"""The door to `torch.distributed`: one process group, or one process behind the same interface.

The launcher of the ranks sets ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``MASTER_ADDR`` and ``MASTER_PORT``
(as torchrun does), and in ``HPC_TIMEOUT`` the seconds after which a rank that keeps others waiting counts as
lost. Without them, or with a world of one, nothing distributed is started.
"""

import contextlib
import ctypes
import datetime
import gc
import ipaddress
import math
import os
import re
import signal
import socket
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any

import psutil
import torch
import torch.distributed as dist

# Now: imported while a group exists, its default arguments hold on to that group for ever.
import torch.distributed.nn
from torch import Tensor, nn
from torch.distributed.constants import default_pg_timeout

TIMEOUT_VARIABLE = "HPC_TIMEOUT"

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


class Stopped(SystemExit):
    """The process was asked to stop (SIGTERM or SIGINT) and has saved its work; its exit status says so."""

    def __init__(self, signum: int | None) -> None:
        # A rank may stop because another one was asked to.
        super().__init__(128 + (signum or signal.SIGTERM))


class LostRank(ConnectionError):
    """Another rank died, or did not answer within the time that ranks may take: to be tried again."""


@dataclass(frozen=True)
class Group:
    """The ranks of this job, seen from one of them. Every method is collective: all ranks call it, in one
    order. One that waits longer than ``HPC_TIMEOUT``, or for a rank that died, raises `LostRank`."""

    rank: int
    world_size: int
    local_rank: int
    """Rank among the processes of this node; it chooses the device."""
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that writes what is written once."""
        return self.rank == 0

    def wrap(self, module: nn.Module) -> nn.Module:
        """Data-parallel ``module``: starts from rank 0's parameters and buffers and averages gradients over
        ranks.

        With one rank it is the module itself. Buffers are not synchronised again: they must not change in
        training.
        """
        if self.world_size == 1:
            return module
        with self._telling("sharing the first weights"):
            # Without device_ids it leaves batches where they are: what belongs on the GPU is there, and what
            # the host reads is not.
            wrapped = nn.parallel.DistributedDataParallel(module, gradient_as_bucket_view=True)
        # As an argument it would also keep buffers from being sent once, now.
        wrapped.broadcast_buffers = False
        return wrapped

    @contextlib.contextmanager
    def accumulating(self, wrapped: nn.Module) -> Iterator[None]:
        """Backward passes inside add to each rank's own gradients; the first one outside averages them over
        ranks."""
        if isinstance(wrapped, nn.parallel.DistributedDataParallel):
            with wrapped.no_sync():
                yield
        else:
            yield

    def sum(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Sum of every tensor over ranks; new tensors, on the CPU."""
        summed = {name: value.detach().to("cpu", copy=True) for name, value in values.items()}
        if self.world_size > 1:
            for name in sorted(summed):
                with self._telling(f"summing {name!r}"):
                    dist.all_reduce(summed[name])
        return summed

    def mean(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Mean of every tensor over ranks; new tensors, on the CPU."""
        return {name: value / self.world_size for name, value in self.sum(values).items()}

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """For each flag, whether it is set on any rank."""
        if self.world_size == 1:
            return flags
        votes = torch.tensor(flags, dtype=torch.uint8)
        with self._telling("a vote"):
            dist.all_reduce(votes, op=dist.ReduceOp.MAX)
        return tuple(bool(vote) for vote in votes)

    def gather(self, value: Any) -> list[Any]:
        """``value`` of every rank, in order of rank, on every rank. Plain Python values and CPU tensors."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        with self._telling("gathering values"):
            dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: Any) -> Any:
        """Rank 0's ``value``, on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        with self._telling("a broadcast from rank 0"):
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.any(False)

    @contextlib.contextmanager
    def _telling(self, what: str) -> Iterator[None]:
        """Inside, what torch says of a lost rank becomes a `LostRank` that names the collective."""
        began = time.monotonic()
        try:
            yield
        except RuntimeError as error:
            if not _tells_of_a_lost_rank(error):
                raise
            what = f"{what} after {time.monotonic() - began:.1f} s"
            raise _lost_rank(self.rank, self.world_size, what, error) from error


@contextlib.contextmanager
def group() -> Iterator[Group]:
    """Join the ranks of this job, and leave them when the block ends.

    Each rank takes the GPU of its local rank where there are GPUs. CPU tensors travel by gloo in any case, so
    that control messages never wait for a device.

    What `Group.wrap` returned must be gone when the block ends.

    Raises
    ------
    ValueError
        where the launcher's variables are incomplete or wrong, or a node has fewer GPUs than ranks.
    LostRank
        where a rank does not come, dies or hangs.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        if world_size > 1:
            raise ValueError(
                f"WORLD_SIZE is {world_size} but {', '.join(missing)} is not set: the launcher of the ranks "
                "sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT"
            )
        rank = 0
    else:
        rank = int(os.environ["RANK"])
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    device = _device(local_rank)
    if device.type == "cpu":
        _keep_freed_memory()
    if world_size == 1:
        yield Group(0, 1, 0, device)
        return
    timeout = _timeout()
    _choose_network(timeout)
    began = time.monotonic()
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=_store(rank, world_size, timeout),
            rank=rank,
            world_size=world_size,
            timeout=timeout,
        )
    except RuntimeError as error:
        what = f"meeting the others at {_address()} after {time.monotonic() - began:.1f} s"
        raise _lost_rank(rank, world_size, what, error) from error
    joined = Group(rank, world_size, local_rank, device)
    try:
        yield joined
        joined.barrier()  # rank 0 serves the store: it must not leave while others still use it
    except RuntimeError as error:
        if not _tells_of_a_lost_rank(error):
            raise
        raise _lost_rank(rank, world_size, "averaging gradients", error) from error  # in what `wrap` gave
    except Stopped as stopped:
        traceback.clear_frames(stopped.__traceback__)  # they hold on to what was wrapped
        raise
    finally:
        # A group that something still holds leaves its threads running; one that lets go of a tensor while
        # the interpreter ends aborts the process.
        gc.collect()
        dist.destroy_process_group()


class StopRequest:
    """Whether this process has been asked to stop; see `stop_requests`."""

    signum: int | None = None

    def __bool__(self) -> bool:
        return self.signum is not None


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Inside the block SIGTERM and SIGINT only set the request that is yielded: the caller stops where it is
    safe.

    Ranks are told at different moments; agree with `Group.any` before acting. Outside the main thread signals
    cannot be caught and the request is never set.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def note(signum: int, frame: FrameType | None) -> None:
        request.signum = signum

    before = {signum: signal.signal(signum, note) for signum in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _timeout() -> datetime.timedelta:
    text = os.environ.get(TIMEOUT_VARIABLE)
    if text is None:
        return default_pg_timeout
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise ValueError(
            f"{TIMEOUT_VARIABLE} is {text!r}, not the seconds that ranks may wait for each other"
        )
    return datetime.timedelta(seconds=seconds)


def _address() -> str:
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"


def _choose_network(timeout: datetime.timedelta) -> None:
    """Set what gloo and NCCL read from the environment, where the launcher has not."""
    # Without it gloo asks what the host's own name resolves to, which may be nothing, or an address that
    # other nodes do not reach.
    name, is_loopback = _interface(os.environ["MASTER_ADDR"])
    os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
    if is_loopback:  # elsewhere NCCL finds the fastest by itself
        os.environ.setdefault("NCCL_SOCKET_IFNAME", name)
    # A process whose collective fails or takes too long ends (torch's default, which nobody may have turned
    # off by accident), also where the thread that watches them hangs in the driver itself.
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "3")
    seconds = max(60, math.ceil(timeout.total_seconds()))
    os.environ.setdefault("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", str(seconds))


def _interface(host: str) -> tuple[str, bool]:
    """The network interface through which this machine reaches ``host``, and whether it is loopback."""
    try:
        family, *_, target = socket.getaddrinfo(host, 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(target)  # sends nothing
            own = probe.getsockname()[0]
    except OSError as error:
        here = socket.gethostname()
        raise ValueError(f"MASTER_ADDR is {host!r}, which {here} cannot reach: {error}") from error
    for name, addresses in psutil.net_if_addrs().items():
        if own in (address.address.partition("%")[0] for address in addresses):
            return name, ipaddress.ip_address(own).is_loopback
    raise ValueError(f"no network interface of {socket.gethostname()} has the address {own}")


def _store(rank: int, world_size: int, timeout: datetime.timedelta) -> Any:
    """The `torch.distributed.Store` in which ranks find each other; rank 0 serves it.

    A server that torch opens by itself listens on every interface of the machine: this one is reached through
    ``MASTER_ADDR`` alone.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    listening = None
    if rank == 0:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        try:
            listener = socket.create_server((address[0], port), family=family, backlog=max(128, world_size))
        except OSError as error:
            raise ValueError(
                f"rank 0 cannot listen at {_address()} ({error}): MASTER_ADDR must be an address of its "
                f"host, {socket.gethostname()}, and MASTER_PORT free there"
            ) from error
        listening = listener.detach()  # the store closes it
    return dist.TCPStore(  # type: ignore[attr-defined]  # public, but not in torch's __all__
        host, port, world_size, rank == 0, timeout, master_listen_fd=listening
    )


def _tells_of_a_lost_rank(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or "/gloo/" in str(error)


def _lost_rank(rank: int, world_size: int, what: str, error: RuntimeError) -> LostRank:
    text = re.sub(r"^\[[^]]*\] ", "", str(error)).partition(". This is typically")[0]
    limit = _timeout().total_seconds()
    return LostRank(
        f"rank {rank} of {world_size} gave up {what}: {text.strip()}. Another rank died, or kept this one "
        f"waiting for {limit:g} s ({TIMEOUT_VARIABLE}): it is the one whose log (log.txt, log.1.txt, ...) "
        "ends first"
    )


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    n_gpus = torch.cuda.device_count()
    if local_rank >= n_gpus:
        raise ValueError(
            f"local rank {local_rank} has no GPU: this node shows {n_gpus}. Ask for as many GPUs as ranks a "
            "node (resources.gpus), or hide them all (CUDA_VISIBLE_DEVICES=) to run on CPUs"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def _keep_freed_memory() -> None:
    """Let the C library keep what is freed instead of giving it back to the system (glibc; others ignore it).

    On CPUs every activation is an allocation of megabytes. Given back and taken again it is a page fault
    every 4 KiB, 20,000 of them in a small training step, which costs 10 to 15% of its time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 2**30)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
