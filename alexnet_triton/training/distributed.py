"""Many processes that train as one: ``torchrun`` starts them, ``torch.distributed`` joins them, one GPU each."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import time
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
        launched: whether a launcher (torchrun, Slurm, MPI) started them, one process too. It hands on to them the signals that
            it gets itself, and may get once more, so that one request to stop reaches a process several times.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    launched: bool = False

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
        """``net`` with gradients that are the mean of all processes', and the leader's weights in all."""
        if self.size == 1:
            return net
        return DistributedDataParallel(net, device_ids=[device] if device.type == "cuda" else None)


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
    gc.collect()  # a DistributedDataParallel that is left holds the group, and the group its threads
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


@contextlib.contextmanager
def joined() -> Iterator[Processes]:
    """The processes that ``torchrun`` started, joined for the block; :data:`ALONE` where it started none."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Processes(launched=True) if "TORCHELASTIC_RUN_ID" in os.environ else ALONE
        return
    global _store
    _store, rank, size = next(dist.rendezvous("env://"))  # type: ignore[attr-defined]
    # Both: what hosts tell each other goes by gloo also where the gradients go by NCCL.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    own = dist.PrefixStore("group", _store)  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=own, rank=rank, world_size=size)
    processes = Processes(dist.get_rank(), size, dist.get_node_local_rank(), launched=True)
    yield processes
    # Not after an error: taking leave could wait for processes that wait for this one. torchrun ends them when it has gone.
    leave()
    _store = None
