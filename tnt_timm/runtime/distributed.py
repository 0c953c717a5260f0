"""The ranks of a run: connect them, and let them agree.

torchrun (or SLURM through it) sets rank and world size in the environment. Without it, this is the only process.
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

from tnt_timm.errors import ConfigError, UserError

PATIENCE = timedelta(hours=1)  # for each other: rank 0 may be writing a large checkpoint or reading a whole stream
POLL_S = 0.02


def env_rank() -> int:
    """Return this process's rank, before the ranks are connected."""
    return int(os.environ.get("RANK", 0))


@dataclass(frozen=True)
class World:
    """This rank and the number of ranks."""

    rank: int
    size: int
    device: torch.device
    local_rank: int = 0  # among the ranks of this machine

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def gather(self, value: Any) -> List[Any]:
        """Return every rank's value, in the order of ranks."""
        if self.size == 1:
            return [value]
        values: List[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def all_true(self, flags: torch.Tensor) -> List[bool]:
        """Return which flags of a boolean tensor (flags,) are true on every rank."""
        if self.size > 1:
            flags = flags.to(torch.uint8)
            dist.all_reduce(flags, op=dist.ReduceOp.MIN)
        return flags.bool().tolist()  # sync

    def same(self, value: Any) -> bool:
        """Return whether the value is equal on every rank."""
        return all(other == value for other in self.gather(value))

    def share_buffers(self, model: nn.Module) -> None:
        """Copy rank 0's buffers, e.g. batch norm statistics, to every rank."""
        if self.size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Raise a UserError of any rank on every rank, so that no rank waits for one that failed."""
        mine = None
        try:
            yield
        except UserError as error:
            mine = error
        for rank, error in enumerate(self.gather(mine)):
            if error is not None:
                text = f"rank {rank}: {error}" if rank > 0 else str(error)
                raise ConfigError(text) if isinstance(error, ConfigError) else UserError(text, everywhere=True)

    def on_main(self, work: Callable[[], object]) -> None:
        """Call `work` on rank 0. If it raises a UserError, every rank does."""
        with self.together():
            if self.is_main:
                work()


@contextlib.contextmanager
def world(device: str) -> Iterator[World]:
    """Connect the ranks for the duration of the context: NCCL on GPUs, gloo on CPUs.

    All references to a DDP model must be gone at its end. Otherwise torch's reducer is the last owner of the process group,
    destroys it while holding the GIL, and waits for a gloo thread that may need the GIL (seen with torch 2.8).

    Args:
        device: "auto", "cuda" or "cpu".

    Raises:
        UserError: there is no GPU for this rank, or the ranks cannot connect.
    """
    rank, size = env_rank(), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    chosen = _device(device, local_rank)
    if size > 1:
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=_store(rank, size), rank=rank, world_size=size, timeout=PATIENCE)
    try:
        yield World(rank, size, chosen, local_rank)
    except BaseException as error:
        if size > 1:
            _clear_locals(error)
        raise
    finally:
        if size > 1:
            dist.destroy_process_group()


def _device(wanted: str, local_rank: int) -> torch.device:
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise UserError("device: cuda: this machine has no usable CUDA GPU; leave it out or pass --device cpu", True)
    if wanted == "cpu" or not available:
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise UserError(f"local rank {local_rank}: this machine has only {count} GPUs; start {count} processes here")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _store(rank: int, size: int) -> dist.Store:
    """Return a store in which the ranks exchange addresses, without the entries of processes that have died.

    torchrun keeps one store for its whole life, so after a restart a rank may wait at the address of a dead process
    (pytorch/pytorch#135712). No variable of torchrun's is both equal on all nodes and new at each start. So each rank
    writes a random name; the store's prefix is a hash of all names, used once every rank has seen the same ones.
    """
    address, port = (os.environ.get(name) for name in ("MASTER_ADDR", "MASTER_PORT"))
    if address is None or port is None:
        raise UserError("MASTER_ADDR, MASTER_PORT: not set, so the ranks cannot connect; start the command by torchrun")
    is_server = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # else torchrun is
    store = dist.TCPStore(address, int(port), is_master=is_server, timeout=PATIENCE, wait_for_workers=False)
    store.set(f"name of {rank}", uuid.uuid4().hex)
    while True:
        names = b" ".join(_values(store, [f"name of {other}" for other in range(size)]))
        store.set(f"seen by {rank}", names)
        if set(_values(store, [f"seen by {other}" for other in range(size)])) == {names}:
            return dist.PrefixStore(hashlib.sha256(names).hexdigest(), store)
        time.sleep(POLL_S)


def _values(store: dist.Store, keys: List[str]) -> List[bytes]:
    """Wait until the store has all keys, and return their values. (`store.wait` would block signals.)"""
    deadline = time.monotonic() + PATIENCE.total_seconds()
    while not store.check(keys):
        if time.monotonic() > deadline:
            missing = [key for key in keys if not store.check([key])]
            raise UserError(
                f"{missing[0]}: the ranks did not connect within {PATIENCE}; check the nodes and their network"
            )
        time.sleep(POLL_S)
    return store.multi_get(keys)


def _clear_locals(error: Optional[BaseException]) -> None:
    """Drop the local variables in the tracebacks of an error and of its causes, as they may hold a DDP model."""
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
