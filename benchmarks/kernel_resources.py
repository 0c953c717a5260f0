#!/usr/bin/env python3
"""Print the resources of the CUDA kernels: `python benchmarks/kernel_resources.py`. It needs no GPU.

It compiles every kernel of the inner transformer for the published models and prints registers, spilled bytes, shared
memory, and the instructions of one tile. Instructions are counted in the loop over tiles, per word and lane.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Dict, List

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tnt_timm.ops import triton_backend, triton_kernels

WIDTHS = {"tnt_ti": (12, 2), "tnt_s": (24, 4), "tnt_b": (40, 4)}  # word width, inner heads
KERNELS = {
    "forward": triton_kernels.forward_kernel,
    "mlp_backward": triton_kernels.mlp_backward_kernel,
    "attention_backward": triton_kernels.attention_backward_kernel,
}
# instruction classes that share a hardware unit, by column name
UNITS = {
    "spills": r"LDL|STL",
    "memory": r"LD[GLS]|ST[GLS]|LDSM|STSM|SHFL",
    "special": r"MUFU",
    "matrix": r"HMMA|HGMMA|UTCHMMA",
}
DTYPES = {"bfloat16": (tl.bfloat16, "bf16"), "float16": (tl.float16, "fp16"), "float32": (tl.float32, "fp32")}
TOOL = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def build(kernel: str, width: int, num_heads: int, capability: int, dtype: str) -> Dict[str, int]:
    """Compile one kernel for stochastic depth and float32 words. Return its resources."""
    function, (product_type, pointer) = KERNELS[kernel], DTYPES[dtype]
    sizes = triton_backend.launch_sizes(kernel, capability, width, num_heads, 16, 4 * width)
    options = {name: sizes.pop(name) for name in ("num_warps", "num_stages")}
    constants = dict(sizes, dtype=product_type)
    types = {"tokens": "i32", "tiles": "i32", "eps": "fp32", "weights": f"*{pointer}"}
    signature = {name: "constexpr" if name in constants else types.get(name, "*fp32") for name in function.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(signature) if signature[name].startswith("*")}
    source = ASTSource(function, signature, {(function.arg_names.index(k),): v for k, v in constants.items()}, aligned)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage = subprocess.run([TOOL, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        code = subprocess.run([TOOL, "-sass", file.name], capture_output=True, text=True, check=True).stdout
    tile = of_a_tile(code)
    lanes = 32 * options["num_warps"]
    counts = {name: sum(bool(re.match(unit, x)) for x in tile) * lanes // sizes["T"] for name, unit in UNITS.items()}
    return {
        "words": sizes["T"],
        "warps": options["num_warps"],
        "registers": int(re.search(r"REG:(\d+)", usage).group(1)),
        "spilled bytes": int(re.search(r"STACK:(\d+)", usage).group(1)),
        "shared bytes": built.metadata.shared,
        "barriers": sum(x.startswith("BAR.SYNC") for x in tile),
        "instructions": len(tile) * lanes // sizes["T"],
        **counts,
    }


def of_a_tile(code: str) -> List[str]:
    """Return the opcodes that one tile executes: those of the loop over tiles, or all if there is no loop."""
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,6})\*/\s+(?:@!?U?P\w+\s+)?(\S+)([^;]*);", code, re.M)
    found = [(int(address, 16), opcode, operands) for address, opcode, operands in lines]
    first, last, size = 0, found[-1][0], found[-1][0] // 2  # shorter loops are spin waits
    for address, opcode, operands in found:
        target = re.search(r"0x([0-9a-f]+)", operands)
        if opcode.startswith("BRA") and target and address - int(target.group(1), 16) > size:
            first, last, size = int(target.group(1), 16), address, address - int(target.group(1), 16)
    return [opcode for address, opcode, _ in found if first <= address <= last and opcode != "NOP"]


def main(argv: List[str]) -> int:
    """Print a row for each kernel."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=WIDTHS, default=list(WIDTHS))
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--capability", type=int, default=90, help="80: A100, 86: RTX 3090, 89: RTX 4090, 90: H100")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the operands of products")
    args = parser.parse_args(argv)
    for model in args.models:
        for kernel in args.kernels:
            resources = build(kernel, *WIDTHS[model], args.capability, args.dtype)
            print(
                f"{model:7}{kernel:19}", "  ".join(f"{name} {value}" for name, value in resources.items()), flush=True
            )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
