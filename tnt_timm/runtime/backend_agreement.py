"""Make all ranks compute inner transformers with the same backends, because a run is a function of its config."""

from typing import Callable, ContextManager, Dict, Sequence, Tuple

import torch
from torch import nn

from tnt_timm import ops
from tnt_timm.runtime.distributed import World


def agree_on_backends(
    networks: Sequence[nn.Module],
    input_size: Tuple[int, int, int],
    autocast: Callable[[], ContextManager],
    world: World,
) -> None:
    """If a backend fails for a layer on one rank, use the reference for that layer on all ranks.

    One machine may have no compiler, or a GPU on which the kernels fail their check. Each rank runs one image through the
    networks, which makes ops choose the backends. Call this before compilation.

    Args:
        networks: on the rank's device, not compiled.
        input_size: (channels, height, width) of the images.
        autocast: makes the precision context of a forward pass.
        world: this rank and the number of ranks.

    Raises:
        UserError: TNT_BACKEND names a backend that fails on some rank.
    """
    with world.together(), torch.no_grad(), autocast(), ops.silent():
        for network in networks:
            training = [module for module in network.modules() if module.training]
            network.eval()(torch.zeros(1, *input_size, device=world.device))
            for module in training:
                module.training = True
    found = world.gather(ops.fallback_reasons())
    forced: Dict[ops.Layer, str] = {}
    for layer in {layer for reasons in found for layer in reasons}:
        missing = f"no {layer.backend} backend"
        reasons = {rank: reasons.get(layer, missing) for rank, reasons in enumerate(found)}
        failed = {rank: reason for rank, reason in reasons.items() if reason is not None}
        if 0 < len(failed) < world.size:
            rank, reason = next(iter(failed.items()))
            forced[layer] = f"rank {rank}: {reason}"
    ops.force_reference(forced)
