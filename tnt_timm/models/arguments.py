"""Check the arguments of the networks, and say what is wrong with them."""

import math
from typing import Any, Optional, Sequence, Tuple, Union

from timm.layers import to_2tuple


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise ValueError if the argument is none of the choices."""
    if value not in choices:
        raise ValueError(f"{name} {value!r} is none of {', '.join(map(repr, choices))}")


def check_positive(**arguments: int) -> None:
    """Raise ValueError if one of the arguments is not a whole number from 1 on."""
    for name, value in arguments.items():
        if not _is_whole(value) or value < 1:
            raise ValueError(f"{name} {value!r} is not a positive whole number")


def check_rates(**arguments: float) -> None:
    """Raise ValueError if one of the arguments is not a number from 0 to 1."""
    for name, value in arguments.items():
        if isinstance(value, (bool, str)) or not 0 <= value <= 1:
            raise ValueError(f"{name} {value!r} is not a rate from 0 to 1")


def check_switches(**arguments: bool) -> None:
    """Raise ValueError if one of the arguments is not True or False; a text such as "no" would count as True."""
    for name, value in arguments.items():
        if value not in (0, 1):
            raise ValueError(f"{name} {value!r} is not True or False")


def check_mlp_ratio(mlp_ratio: float, *widths: int) -> None:
    """Raise ValueError if an MLP of one of these widths would have no hidden units, or no finite number."""
    if isinstance(mlp_ratio, (bool, str)) or not math.isfinite(mlp_ratio) or int(min(widths) * mlp_ratio) < 1:
        raise ValueError(
            f"mlp_ratio {mlp_ratio!r} leaves an MLP of width {min(widths)} no hidden units; choose 4, for example"
        )


def check_size(name: str, size: Union[int, Tuple[int, int]]) -> Tuple[int, int]:
    """Return (height, width); raise ValueError if the argument is neither a whole number nor two."""
    both = to_2tuple(size)
    if len(both) != 2 or not all(map(_is_whole, both)):
        raise ValueError(f"{name} {size!r} is neither a whole number of pixels nor (height, width)")
    return tuple(both)


def _is_whole(value: Any) -> bool:
    return type(value) is not bool and hasattr(value, "__index__")  # so has a symbolic number of torch.compile


def check_per_stage(stages: int, **arguments: Sequence[int]) -> None:
    """Raise ValueError if one of the arguments is not a list of positive numbers, one for each stage."""
    for name, values in arguments.items():
        if not isinstance(values, (list, tuple)) or len(values) != stages or not all(map(_is_whole, values)):
            raise ValueError(f"{name} {values!r}: give a list of {stages} whole numbers, one for each stage")
        if min(values) < 1:
            raise ValueError(f"{name} {values!r}: {min(values)} is not a positive number")


def check_inner_blocks(inner_blocks: Optional[Sequence[int]], depth: int, sentence_start: str) -> Sequence[int]:
    """Return the numbers of the blocks with an inner transformer, counted from 1; raise ValueError if some are wrong."""
    if inner_blocks is None:
        return range(1, depth + 1)
    if isinstance(inner_blocks, int):
        raise ValueError(f"inner_blocks {inner_blocks}: give a list of block numbers, counted from 1")
    wrong = [number for number in inner_blocks if number not in range(1, depth + 1)]
    if wrong:
        raise ValueError(f"inner_blocks {list(inner_blocks)}: {wrong[0]} is none of the blocks 1 to {depth}")
    if not inner_blocks and sentence_start == "zeros":
        raise ValueError("inner_blocks []: sentences that start at zero would never see the image; add a block")
    return inner_blocks
