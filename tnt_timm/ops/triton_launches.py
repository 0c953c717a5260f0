"""Launch sizes of the CUDA kernels, by compute capability, kernel and padded width of the words."""

from typing import Dict, NamedTuple, Optional


class Launch(NamedTuple):
    """How one kernel is launched."""

    tile_words: int  # words that a program computes at a time; raised to one sentence if smaller
    num_warps: int
    num_stages: int  # with 2 or more, the next tile is loaded during the current one, which takes shared memory


Launches = Dict[str, Dict[int, Launch]]  # by kernel and padded width of the words

# No row was timed on a GPU. `benchmarks/kernel_resources.py` chose them: few instructions per word, spills that fit into the
# L1 cache, and at most 99 KB of shared memory, the limit of a block on compute capability 8.6, 8.9 and 12.0.
DEFAULT: Launches = {
    "forward": {16: Launch(128, 4, 1), 32: Launch(64, 4, 1), 64: Launch(64, 4, 1)},
    "mlp_backward": {16: Launch(32, 2, 1), 32: Launch(64, 4, 1), 64: Launch(32, 8, 1)},
    "attention_backward": {16: Launch(32, 2, 1), 32: Launch(64, 4, 1), 64: Launch(32, 4, 1)},
}

# By compute capability, 90 for 9.0. DEFAULT has the missing capabilities and widths. `source` prints an entry.
LAUNCHES: Dict[int, Launches] = {
    90: {
        "forward": {16: Launch(128, 4, 1), 32: Launch(64, 4, 1), 64: Launch(64, 4, 1)},
        "mlp_backward": {16: Launch(64, 4, 1), 32: Launch(64, 4, 1), 64: Launch(128, 8, 1)},
        "attention_backward": {16: Launch(32, 2, 1), 32: Launch(64, 4, 1), 64: Launch(128, 8, 1)},
    },
}

# For tuning: an override applies to all capabilities and widths.
OVERRIDES: Dict[str, Launch] = {}


def launch(capability: Optional[int], kernel: str, width: int) -> Launch:
    """Return a kernel's launch sizes.

    Args:
        capability: the GPU's compute capability, 90 for 9.0; None without a GPU.
        kernel: "forward", "mlp_backward" or "attention_backward".
        width: CP, the padded width of the words.
    """
    if kernel in OVERRIDES:
        return OVERRIDES[kernel]
    return LAUNCHES.get(capability, {}).get(kernel, {}).get(width) or DEFAULT[kernel][width]


def source(capability: int, launches: Launches) -> str:
    """Return an entry of `LAUNCHES` as Python source."""
    lines = [f"    {capability}: {{"]
    for kernel, by_width in launches.items():
        row = ", ".join(f"{width}: Launch{tuple(by_width[width])}" for width in sorted(by_width))
        lines.append(f'        "{kernel}": {{{row}}},')
    return "\n".join([*lines, "    },"]) + "\n"
