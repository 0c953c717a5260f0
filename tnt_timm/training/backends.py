"""Make all ranks of a run use the same backends, because a run is a function of its config."""

import copy
from typing import Callable, ContextManager, Dict, Sequence, Tuple

import torch
from torch import nn

from tnt_timm import ops
from tnt_timm.training.distributed import World


def agree_on_backends(
    networks: Sequence[nn.Module],
    input_size: Tuple[int, int, int],
    autocast: Callable[[], ContextManager],
    world: World,
) -> None:
    """Let the reference compute on every rank what a backend cannot compute on one of them.

    One machine may have no compiler, or a GPU on which the kernels fail their check. Each rank computes one image with copies
    of the networks, which makes these choices, before any network is compiled.

    Args:
        networks: on the rank's device, not compiled.
        input_size: (channels, height, width) of the images.
        autocast: makes the precision context of a forward pass.
        world: this process among all.

    Raises:
        UserError: TNT_BACKEND names a backend that fails on some rank.
    """
    if world.size == 1:
        return
    with world.together(), torch.no_grad(), autocast():
        for network in networks:
            copy.deepcopy(network).eval()(torch.zeros(1, *input_size, device=world.device))
    found = world.gather(ops.decisions())
    declined: Dict[ops.Layer, str] = {}
    for layer in {layer for decisions in found for layer in decisions}:
        whys = {rank: decisions[layer] for rank, decisions in enumerate(found) if layer in decisions}
        reasons = [f"rank {rank}: {why}" for rank, why in whys.items() if why is not None]
        if 0 < len(reasons) < len(whys):
            declined[layer] = reasons[0]
    ops.decline(declined)
