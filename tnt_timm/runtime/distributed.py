"""Connect the ranks of a run, so that they compute together."""

import contextlib
import traceback
from dataclasses import dataclass, field
from typing import Any, Iterator, List, Optional

import torch
import torch.distributed as dist
from torch import nn

from tnt_timm.errors import ConfigError, UserError, one_line
from tnt_timm.runtime.launch import Launch
from tnt_timm.runtime.meeting import PATIENCE, Agreement, Meeting


@dataclass(frozen=True)
class World(Agreement):
    """This rank and the number of ranks."""

    rank: int
    size: int
    device: torch.device
    local_rank: int = 0  # among the ranks of this machine
    meeting: Meeting = field(default_factory=Meeting)

    def gather(self, value: Any) -> List[Any]:
        """Return every rank's value, in the order of ranks."""
        if self.size == 1:
            return [value]
        values: List[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def gather_slow(self, value: Any) -> List[Any]:
        """Do the same after work that may take long on some ranks: say who is missing."""
        with self.meeting.naming_the_missing():
            return self.gather(value)

    def all_true(self, flags: torch.Tensor) -> List[bool]:
        """Return which flags of a boolean tensor (flags,) are true on every rank."""
        if self.size > 1:
            flags = flags.to(torch.uint8)
            dist.all_reduce(flags, op=dist.ReduceOp.MIN)
        return flags.bool().tolist()  # sync

    def share_buffers(self, model: nn.Module) -> None:
        """Copy rank 0's buffers, e.g. batch norm statistics, to every rank."""
        if self.size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)

    def check_same_weights(self, model: nn.Module) -> None:
        """Raise ConfigError if a rank has another model or other weights, up to what different processors round differently."""
        if self.size == 1:
            return
        shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
        self.agree(shapes, "all ranks need the same model")
        norms = torch.stack([value.detach().double().norm().cpu() for value in model.state_dict().values()])
        found = self.gather(norms)
        for rank, other in enumerate(found):
            differing = ~torch.isclose(other, found[0], rtol=1e-6, atol=1e-12, equal_nan=True)
            if differing.any():
                name = list(shapes)[int(differing.nonzero()[0])]
                error = ConfigError(
                    f"rank {rank}: other weights than rank 0 ({name} and {int(differing.sum()) - 1} more); "
                    f"all ranks need the same weights file"
                )
                error.everywhere = True
                raise error


def choose_device(wanted: str, launch: Launch) -> torch.device:
    """Return the device of this rank.

    Args:
        wanted: "auto", "cuda" or "cpu".
        launch: this rank among all.

    Raises:
        UserError: there is no GPU for this rank.
    """
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise UserError("device: cuda: this machine has no usable CUDA GPU; leave it out or pass --device cpu")
    if wanted == "cpu" or not available:
        return torch.device("cpu")
    count, local_rank = torch.cuda.device_count(), launch.local_rank
    if local_rank is None and launch.size > 1 and count > 1:
        raise ConfigError(
            f"environment: LOCAL_RANK is not set, and this machine has {count} GPUs for rank {launch.rank}; "
            f"start with torchrun"
        )
    local_rank = local_rank or 0
    if local_rank >= count:
        raise UserError(f"local rank {local_rank}: this machine has only {count} GPUs; start {count} processes here")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


@contextlib.contextmanager
def world(device: torch.device, meeting: Optional[Meeting] = None) -> Iterator[World]:
    """Connect the ranks for the duration of the context: NCCL on GPUs, gloo on CPUs.

    All references to a DDP model must be gone at its end. Otherwise torch's reducer is the last owner of the process group,
    destroys it while holding the GIL, and waits for a gloo thread that may need the GIL (seen with torch 2.8).

    Args:
        device: of this rank, of the same type on every rank.
        meeting: the ranks that have met. None for this process alone.

    Raises:
        UserError: the ranks cannot connect.
    """
    meeting = meeting or Meeting()
    rank, size = meeting.rank, meeting.size
    if size > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        try:
            dist.init_process_group(backend, store=meeting.store, rank=rank, world_size=size, timeout=PATIENCE)
        except dist.DistError as error:
            text = f"the ranks cannot connect by {backend}: {one_line(error, 120)}"
            raise UserError(
                f"{text}; check the network between the machines (GLOO_SOCKET_IFNAME, NCCL_DEBUG=INFO)"
            ) from None
    try:
        yield World(rank, size, device, meeting.launch.local_rank or 0, meeting)
    except BaseException as error:
        meeting.leave(error)  # before the connections close, so that the others know why
        if size > 1:
            _clear_locals(error)
        raise
    finally:
        if size > 1:
            dist.destroy_process_group()


def _clear_locals(error: Optional[BaseException]) -> None:
    """Drop the local variables in the tracebacks of an error and of its causes, as they may hold a DDP model."""
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
