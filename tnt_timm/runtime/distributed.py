"""One process or many: who am I, and how do all agree.

torchrun (or SLURM through it) says so in the environment; without it, this is the only process.
"""

import contextlib
import hashlib
import os
import time
import traceback
import uuid
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Callable, Iterator, List, Optional

import torch
import torch.distributed as dist
from torch import nn

from tnt_timm.errors import UserError

# How long processes wait for each other: the first one may be writing a large checkpoint or reading a whole stream.
PATIENCE = timedelta(hours=1)
POLL_S = 0.02


def env_rank() -> int:
    """This process's rank, before anything else is known."""
    return int(os.environ.get("RANK", 0))


@dataclass(frozen=True)
class World:
    """This process among all processes of the run."""

    rank: int
    size: int
    device: torch.device
    local_rank: int = 0  # among the processes of this machine

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def gather(self, value: Any) -> List[Any]:
        """Every process's value, in the order of ranks, on every process."""
        if self.size == 1:
            return [value]
        values: List[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def all_true(self, flags: torch.Tensor) -> List[bool]:
        """Which of the flags in a boolean tensor (flags,) are true on every process."""
        if self.size > 1:
            flags = flags.to(torch.uint8)
            dist.all_reduce(flags, op=dist.ReduceOp.MIN)
        return flags.bool().tolist()  # sync

    def same(self, value: Any) -> bool:
        """Whether the value is equal on every process."""
        return all(other == value for other in self.gather(value))

    def share_buffers(self, model: nn.Module) -> None:
        """Give every process the first one's buffers (batch norm statistics, where a model has them)."""
        if self.size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """A UserError on any process becomes one on all of them, instead of leaving the others to wait."""
        mine = None
        try:
            yield
        except UserError as error:
            mine = error
        for rank, error in enumerate(self.gather(mine)):
            if error is not None:
                raise UserError(f"process {rank}: {error}" if rank > 0 else str(error), everywhere=True)

    def on_main(self, work: Callable[[], object]) -> None:
        """Let the first process do something for all; its UserError is everyone's."""
        with self.together():
            if self.is_main:
                work()


def _store_of_this_start(rank: int, size: int) -> dist.Store:
    """Where the processes leave their addresses for each other, apart from those of processes that are no more.

    torchrun keeps one store for as long as it lives, and so the addresses of the processes that it starts again: a new
    process may wait for a dead one (pytorch/pytorch#135712). Nothing that torchrun tells is equal on all nodes and new in
    each start, so the processes make such a name: each leaves a new one of its own, and goes on when all others have seen it
    with theirs. What a dead process left does not hold the new names.
    """
    address, port = (os.environ.get(name) for name in ("MASTER_ADDR", "MASTER_PORT"))
    if address is None or port is None:
        raise UserError("several processes, and no MASTER_ADDR and MASTER_PORT where they meet; start them by torchrun")
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # else torchrun does
    store = dist.TCPStore(address, int(port), is_master=serves, timeout=PATIENCE, wait_for_workers=False)
    store.set(f"name of {rank}", uuid.uuid4().hex)
    ranks = range(size)
    while True:
        names = b" ".join(_values(store, [f"name of {other}" for other in ranks]))
        store.set(f"seen by {rank}", names)
        if set(_values(store, [f"seen by {other}" for other in ranks])) == {names}:
            return dist.PrefixStore(hashlib.sha256(names).hexdigest(), store)
        time.sleep(POLL_S)


def _values(store: dist.Store, keys: List[str]) -> List[bytes]:
    """Once all are there. The store's own way of waiting would hold up signals."""
    deadline = time.monotonic() + PATIENCE.total_seconds()
    while not store.check(keys):
        if time.monotonic() > deadline:
            missing = [key for key in keys if not store.check([key])]
            raise UserError(f"the processes did not meet within {PATIENCE}: no {missing[0]}")
        time.sleep(POLL_S)
    return store.multi_get(keys)


def _forget_locals(error: Optional[BaseException]) -> None:
    """Clear what the frames of an error, and of those that led to it, hold; its lines stay."""
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


@contextlib.contextmanager
def world(device: str) -> Iterator[World]:
    """Join the other processes for as long as the context lasts: NCCL on GPUs, gloo on CPUs.

    What holds a DDP model must be gone by its end. torch's reducer would else be the last to hold the process group, end it
    with Python's lock in its hands, and wait for a thread of gloo that may want this lock (seen with torch 2.8).

    Args:
        device: "auto", "cuda" or "cpu".

    Raises:
        UserError: a GPU is wanted that is not there.
    """
    rank, size = env_rank(), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device: cuda: this machine has no usable CUDA GPU; leave it out or pass --device cpu", True)
    if device == "cpu" or not torch.cuda.is_available():
        chosen = torch.device("cpu")
    elif local_rank >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise UserError(f"process {local_rank} of this machine has no GPU: there are {count}; start {count} processes")
    else:
        chosen = torch.device("cuda", local_rank)
        torch.cuda.set_device(chosen)
    if size > 1:
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(
            backend, store=_store_of_this_start(rank, size), rank=rank, world_size=size, timeout=PATIENCE
        )
    try:
        yield World(rank, size, chosen, local_rank)
    except BaseException as error:
        if size > 1:
            _forget_locals(error)
        raise
    finally:
        if size > 1:
            dist.destroy_process_group()
