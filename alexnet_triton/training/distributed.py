"""Many processes that train as one: ``torchrun`` starts them, ``torch.distributed`` joins them, one GPU each."""

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
    """The processes of a run, seen by one of them. Every method but :meth:`share` is to be called by all of them alike.

    Attributes:
        rank: of this process; 0 leads: it reads, writes and prints.
        size: how many there are.
        local_rank: of this process on its machine, and of its GPU.
        grouped: whether ``torch.distributed`` joins them, as it does more than one; of one process, gradients go that way too.
        launched: whether a launcher (torchrun, Slurm, MPI) started them, one process too. It hands on to them the signals that
            it gets itself, and may get once more, so that one request to stop reaches a process several times.
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
        """Whether this process reads, writes and prints for all."""
        return self.rank == 0

    def share(self, index: Tensor) -> Tensor:
        """This process's part of a batch; parts differ by one image at most, and may be empty."""
        return index if self.size == 1 else index.tensor_split(self.size)[self.rank]

    def add_up(self, tensor: Tensor) -> Tensor:
        """``tensor``, which becomes the sum of all processes' tensors."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is true in any process. Between hosts: nobody waits for a GPU."""
        return self.any_of(flag)[0]

    def any_of(self, *flags: bool) -> list[bool]:
        """:meth:`any` of each of ``flags``, of which every process has as many."""
        return list(flags) if self.size == 1 else self.add_up(torch.tensor(flags).int()).bool().tolist()

    def wait(self) -> None:
        """Until all have come here."""
        self.any(False)

    def gather(self, value: T) -> list[T]:
        """Every process's ``value``, by rank, in the process that leads; an empty list in the others."""
        if self.size == 1:
            return [value]
        values: list[Any] | None = [None] * self.size if self.leads else None
        dist.gather_object(value, values)
        return values or []

    def from_leader(self, make: Callable[[], T]) -> T:
        """What ``make`` returns in the process that leads, in all of them.

        Raises:
            SystemExit: in the others, if it raised in the one that leads, which says why.
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
        """What ``make`` returns, called by one process of a machine before the others: it may download what those then find."""
        early = make() if self.local_rank == 0 else None
        self.wait()
        return early if early is not None else make()

    def parallel(self, net: nn.Module, device: torch.device) -> nn.Module:
        """``net`` with gradients that are the mean of all processes', and the leader's weights in all.

        A bucket's gradients are added up while the backward pass goes on. On CUDA a step can be captured on the stream on which
        this was called.
        """
        if not self.grouped:
            return net
        device_ids = [device] if device.type == "cuda" else None
        return DistributedDataParallel(net, device_ids, bucket_cap_mb=_BUCKET_MIB, gradient_as_bucket_view=True)


#: Gradients are added up whenever so many MiB are there. Of AlexNet's backward pass the weights of the two large linear layers
#: come first and fill a bucket each. What is left when it ends, and overlaps nothing, is less than this: with PyTorch's 25 MiB
#: it would be all convolutions, 15 MB in float32 (arithmetic).
_BUCKET_MIB = 4

#: A run of one process.
ALONE = Processes()

#: Where the processes of this run leave word for each other, without waiting; None where there is one.
_store: Any = None


def first_to_say(message: str) -> bool:
    """Whether no process of this run has said ``message`` yet: what all of them find out, one tells the user.

    It waits for nobody, so that one that fails can ask it. Where the store has gone with the process that kept it: yes.
    """
    if _store is None:
        return True
    try:
        return _store.add(f"said: {message}", 1) == 1
    except RuntimeError:
        return True


def leave() -> None:
    """Take leave of the other processes, when all have come here; the group must be able to talk on the CPU, by gloo.

    gloo's thread lets go of a tensor only after it has said that it is done with it, and wants Python's lock for that. If
    Python has come to its end by then, the process aborts, with all its work done: "terminate called without an active
    exception" (torch 2.14). So this waits until the thread holds nothing.
    """
    # A DistributedDataParallel that is left holds the group, and the group its threads. NCCL lets no group go before each CUDA
    # graph that holds its launches.
    gc.collect()
    last = torch.zeros(())
    count: Callable[[], int] = last._use_count  # type: ignore[attr-defined]
    holders = count()
    dist.all_reduce(last)
    end = time.monotonic() + _PATIENCE
    while count() > holders and time.monotonic() < end:
        time.sleep(0.001)
    dist.destroy_process_group()


#: Seconds that :func:`leave` gives gloo's thread, which needs less than a millisecond of its own.
_PATIENCE = 10.0


def _own_part(store: Any, rank: int, size: int) -> Any:
    """The part of ``store`` that these processes use. Called by all of them alike.

    torchrun keeps its store when it starts processes again, with the addresses in it of those that have gone. How many times it
    did so no process knows: after a fault on another machine its own agent does not count. So the leader says a new name, and
    another process believes it as soon as the leader has answered by that name.

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
    """The processes that ``torchrun`` started, joined for the block; :data:`ALONE` where it started none."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Processes(launched=True) if "TORCHELASTIC_RUN_ID" in os.environ else ALONE
        return
    global _store
    store, rank, size = next(dist.rendezvous("env://"))  # type: ignore[attr-defined]
    _store = _own_part(store, rank, size)
    # Both: what hosts tell each other goes by gloo also where the gradients go by NCCL.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    own = dist.PrefixStore("group", _store)  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=own, rank=rank, world_size=size)
    processes = Processes(dist.get_rank(), size, dist.get_node_local_rank(), launched=True)
    yield processes
    # Not after an error: taking leave could wait for processes that wait for this one. torchrun ends them when it has gone.
    leave()
    _store = None
