"""Grids of sentences in the stages of a PyramidTNT, and relative positions resampled from one grid to another."""

from typing import List, Tuple

from timm.layers import resample_abs_pos_embed
from torch import Tensor

Grid = Tuple[int, int]  # rows and columns


def coarser(grid: Tuple[int, int], ratio: int) -> Tuple[int, int]:
    """Return the grid whose cells cover `ratio` x `ratio` cells; those at the border may cover fewer."""
    # written as PyTorch computes the output size of a convolution, so that torch.compile sees that both are equal
    return (grid[0] - 1) // ratio + 1, (grid[1] - 1) // ratio + 1


def stage_grids(grid: Grid) -> List[Grid]:
    """Return the grids of the four stages, given the first one."""
    return [coarser(grid, 2**number) for number in range(4)]


def resample_relative_pos(
    relative_pos: Tensor, new_grid: Tuple[int, int], old_grid: Tuple[int, int], sr_ratio: int
) -> Tensor:
    """Resample relative positions (bicubic, antialiased) to another grid: along the queries, then along the keys.

    Args:
        relative_pos: (1, H, N, K), for H heads, N queries on the grid and K keys on the grid that `sr_ratio` makes coarser.
        new_grid, old_grid: rows and columns of the queries.
        sr_ratio: spatial reduction of the keys.

    Returns:
        (1, H, N', K').
    """
    H = relative_pos.shape[1]
    x = relative_pos.permute(0, 2, 1, 3).flatten(2)  # (1, N, H*K)
    x = resample_abs_pos_embed(x, new_grid, old_grid, 0).unflatten(2, (H, -1))  # (1, N', H, K)
    x = x.permute(0, 3, 2, 1).flatten(2)  # (1, K, H*N')
    x = resample_abs_pos_embed(x, coarser(new_grid, sr_ratio), coarser(old_grid, sr_ratio), 0).unflatten(2, (H, -1))
    return x.permute(0, 2, 3, 1).contiguous()
