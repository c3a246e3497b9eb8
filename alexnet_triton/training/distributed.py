"""Data-parallel training: ``torchrun`` starts the processes, one per GPU, and ``torch.distributed`` connects them."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Processes:
    """The processes of a run, as seen by one of them. All processes must make the same calls, except of :meth:`share`.

    Attributes:
        rank: rank of this process. Rank 0 is the leader, which reads, writes and prints.
        size: number of processes.
        local_rank: index of this process on its machine, and of its GPU.
        grouped: whether the processes form a ``torch.distributed`` group. More than one always do. A single process may: its
            gradients then go through DistributedDataParallel too.
        launched: whether a launcher (torchrun, Slurm, MPI) started the processes, even a single one. A launcher forwards the
            signals that it gets, so one request to stop can reach a process several times.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    launched: bool = False
    grouped: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "grouped", self.grouped or self.size > 1)

    @property
    def leads(self) -> bool:
        """Whether this process is the leader, which reads, writes and prints for all."""
        return self.rank == 0

    def share(self, index: Tensor) -> Tensor:
        """This process's share of the batch ``index``. Shares differ in size by at most one image, and may be empty."""
        return index if self.size == 1 else index.tensor_split(self.size)[self.rank]

    def add_up(self, tensor: Tensor) -> Tensor:
        """Sum ``tensor`` over all processes, in place, and return it."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is true in any process. Only CPUs communicate: no GPU is waited for."""
        return self.any_of(flag)[0]

    def any_of(self, *flags: bool) -> list[bool]:
        """:meth:`any` of each of ``flags``. Every process passes the same number of flags."""
        return list(flags) if self.size == 1 else self.add_up(torch.tensor(flags).int()).bool().tolist()

    def wait(self) -> None:
        """Wait until all processes have made this call."""
        self.any(False)

    def gather(self, value: T) -> list[T]:
        """In the leader, the ``value`` of every process in order of rank; in the others an empty list."""
        if self.size == 1:
            return [value]
        values: list[Any] | None = [None] * self.size if self.leads else None
        dist.gather_object(value, values)
        return values or []

    def from_leader(self, make: Callable[[], T]) -> T:
        """Call ``make`` in the leader and return its result in all processes.

        Raises:
            SystemExit: in the other processes, if ``make`` raised in the leader. The leader reports the error.
        """
        if self.size == 1:
            return make()
        sent: list[Any] = [None, False]
        try:
            if self.leads:
                sent = [make(), True]
        finally:
            dist.broadcast_object_list(sent)
        if not sent[1]:
            raise SystemExit(1)
        return sent[0]

    def first_on_each_machine(self, make: Callable[[], T]) -> T:
        """Call ``make``, in one process of each machine before the others: it may download files that the others then find."""
        early = make() if self.local_rank == 0 else None
        self.wait()
        return early if early is not None else make()

    def parallel(self, net: nn.Module, device: torch.device) -> nn.Module:
        """Wrap ``net`` in DistributedDataParallel, which averages gradients and broadcasts the leader's weights.

        Buckets of gradients are all-reduced while the backward pass continues. On CUDA a step can be captured on the stream on
        which this method was called. Without a group ``net`` itself is returned.
        """
        if not self.grouped:
            return net
        device_ids = [device] if device.type == "cuda" else None
        return DistributedDataParallel(net, device_ids, bucket_cap_mb=_BUCKET_MIB, gradient_as_bucket_view=True)


#: Bucket size of DistributedDataParallel in MiB. In AlexNet's backward pass the weight gradients of the two large linear layers
#: come first and fill a bucket each. The last bucket overlaps no computation, and is smaller than this. With PyTorch's 25 MiB
#: it would hold all convolutions, 15 MB in float32 (arithmetic).
_BUCKET_MIB = 4

#: The only process of a run.
ALONE = Processes()

#: Key-value store shared by the processes of this run; None for a single process.
_store: Any = None


def first_to_say(message: str) -> bool:
    """Whether no process of this run has printed ``message`` yet, so that only one of them prints it.

    This waits for no other process, so a failing process can call it. If the process that holds the store has ended, the
    answer is True.
    """
    if _store is None:
        return True
    try:
        return _store.add(f"said: {message}", 1) == 1
    except RuntimeError:
        return True


def leave() -> None:
    """Destroy the process group once all processes have made this call. The group must have gloo on the CPU.

    gloo's thread reports an operation as done before it releases the tensor, and it needs Python's lock for the release. If the
    interpreter is finalizing by then, the process aborts with all its work done: "terminate called without an active
    exception" (torch 2.14). So this function waits until the thread has released its tensor.
    """
    # A DistributedDataParallel object keeps the group and its threads alive. NCCL destroys a group only after every CUDA graph
    # with launches of that group.
    gc.collect()
    last = torch.zeros(())
    count: Callable[[], int] = last._use_count  # type: ignore[attr-defined]
    holders = count()
    dist.all_reduce(last)
    end = time.monotonic() + _PATIENCE
    while count() > holders and time.monotonic() < end:
        time.sleep(0.001)
    dist.destroy_process_group()


#: The most seconds that :func:`leave` waits for gloo's thread, which needs less than a millisecond.
_PATIENCE = 10.0


def _own_part(store: Any, rank: int, size: int) -> Any:
    """``store`` with a key prefix that only this start of the processes uses. All processes call this.

    torchrun keeps its store when it restarts processes, with the addresses of the ended processes in it. No process knows the
    number of restarts: after a fault on another machine the local agent does not count one. So the leader writes a new prefix.
    Another process trusts a prefix once the leader has answered it under that prefix.

    Raises:
        RuntimeError: the leader does not answer within the store's timeout.
    """
    own = uuid.uuid4().hex
    if rank == 0:
        store.set("name", own)
        for other in range(1, size):
            store.set(f"{own}/heard/{other}", store.get(f"{own}/of/{other}"))
        return dist.PrefixStore(own, store)  # type: ignore[attr-defined]
    end = time.monotonic() + store.timeout.total_seconds()
    while time.monotonic() < end:
        name = store.get("name").decode()
        store.set(f"{name}/of/{rank}", own)
        if store.check([heard := f"{name}/heard/{rank}"]) and store.get(heard).decode() == own:
            return dist.PrefixStore(name, store)  # type: ignore[attr-defined]
        time.sleep(0.01)
    raise RuntimeError("the first process of this run does not answer")


@contextlib.contextmanager
def joined() -> Iterator[Processes]:
    """Join the processes that ``torchrun`` started for the time of the block; yields :data:`ALONE` if it started none."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Processes(launched=True) if "TORCHELASTIC_RUN_ID" in os.environ else ALONE
        return
    global _store
    store, rank, size = next(dist.rendezvous("env://"))  # type: ignore[attr-defined]
    _store = _own_part(store, rank, size)
    # Both backends: CPU tensors go by gloo even where gradients go by NCCL.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    own = dist.PrefixStore("group", _store)  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=own, rank=rank, world_size=size)
    processes = Processes(dist.get_rank(), size, dist.get_node_local_rank(), launched=True)
    yield processes
    # Not after an error: leave() could wait for processes that wait for this one. torchrun ends them when this one has ended.
    leave()
    _store = None
