"""The door to `torch.distributed`: one process group, or one process behind the same interface.

The launcher of the ranks sets ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``MASTER_ADDR`` and ``MASTER_PORT``
(as torchrun does). Without them, or with a world of one, nothing distributed is started.
"""

import contextlib
import ctypes
import ipaddress
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.constants import default_pg_timeout

log = logging.getLogger(__name__)

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


class Stopped(SystemExit):
    """The process was asked to stop (SIGTERM or SIGINT) and has saved its work; its exit status says so."""

    def __init__(self, signum: int | None) -> None:
        # A rank may stop because another one was asked to.
        super().__init__(128 + (signum or signal.SIGTERM))


@dataclass(frozen=True)
class Group:
    """The ranks of this job, seen from one of them. Every method is collective: all ranks call it, in one
    order."""

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
        on_gpu = self.device.type == "cuda"
        wrapped = nn.parallel.DistributedDataParallel(
            module, device_ids=[self.device] if on_gpu else None, gradient_as_bucket_view=True
        )
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
        dist.all_reduce(votes, op=dist.ReduceOp.MAX)
        return tuple(bool(vote) for vote in votes)

    def gather(self, value: Any) -> list[Any]:
        """``value`` of every rank, in order of rank, on every rank. Plain Python values and CPU tensors."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: Any) -> Any:
        """Rank 0's ``value``, on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.any(False)


@contextlib.contextmanager
def group() -> Iterator[Group]:
    """Join the ranks of this job, and leave them when the block ends.

    Each rank takes the GPU of its local rank where there are GPUs. CPU tensors travel by gloo in any case, so
    that control messages never wait for a device.

    Raises
    ------
    ValueError
        where the launcher's variables are incomplete, or a node has fewer GPUs than ranks.
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
    if _is_loopback(os.environ["MASTER_ADDR"]):
        # Ranks of one machine: without this gloo asks what the host's own name resolves to, which may be
        # nothing or an address that others reach.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=_store(rank, world_size), rank=rank, world_size=world_size)
    try:
        yield Group(rank, world_size, local_rank, device)
        dist.barrier()  # rank 0 serves the store: it must not leave while others still use it
    finally:
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


def _store(rank: int, world_size: int) -> Any:
    """The `torch.distributed.Store` in which ranks find each other; rank 0 serves it.

    A server that torch opens by itself listens on every interface of the machine: this one is reached through
    ``MASTER_ADDR`` alone.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    listening = None
    if rank == 0:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server((address[0], port), family=family, backlog=max(128, world_size))
        listening = listener.detach()  # the store closes it
    return dist.TCPStore(  # type: ignore[attr-defined]  # public, but not in torch's __all__
        host, port, world_size, rank == 0, default_pg_timeout, master_listen_fd=listening
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


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"
