"""Check the arguments of the networks, and say what is wrong with them."""

from typing import Optional, Sequence


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise ValueError if the argument is none of the choices."""
    if value not in choices:
        raise ValueError(f"{name} {value!r} is none of {', '.join(map(repr, choices))}")


def check_positive(**arguments: int) -> None:
    """Raise ValueError if one of the arguments is below 1."""
    for name, value in arguments.items():
        if value < 1:
            raise ValueError(f"{name} {value} is not a positive number")


def check_per_stage(stages: int, **arguments: Sequence[int]) -> None:
    """Raise ValueError if one of the arguments is not a list of positive numbers, one for each stage."""
    for name, values in arguments.items():
        if not isinstance(values, (list, tuple)) or len(values) != stages or not all(type(x) is int for x in values):
            raise ValueError(f"{name} {values!r}: give a list of {stages} numbers, one for each stage")
        check_positive(**{name: min(values)})


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
