"""Format the results of all stages as report.md, and as the summary that is printed at the end."""

import json
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

from tnt_timm.console import table

STAGES = ("machine", "kernels", "product", "speed", "tuning", "loading")
Row = Dict[str, Any]
LINES = 60  # of the summary at most


def read(folder: Path) -> List[Row]:
    """Return the results, without incomplete lines."""
    file = folder / "results.jsonl"
    rows = []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def markdown(rows: Sequence[Row]) -> str:
    """Return report.md."""
    sections = (
        _machine, _kernels, _product, _speed, _memory, _parts, _slowest_kernels, _tuning, _loading,
    )  # fmt: skip
    return "\n".join(["# On a GPU", *(line for section in sections for line in _lines(section, rows))]) + "\n"


def short(rows: Sequence[Row]) -> str:
    """Return the summary: failures, and the most important figures."""
    lines = []
    for stage in STAGES:
        found = [row for row in rows if row["stage"] == stage]
        failed = [row for row in found if not row["ok"]]
        lines.append(f"{stage}: {len(found) - len(failed)} of {len(found)} right")
        lines += [f"  FAILED {row['what']}: {row.get('detail', '')}"[:160] for row in failed[:6]]
        lines += [f"  and {len(failed) - 6} more"] if len(failed) > 6 else []
    sections = (_machine, _speed, _tuning, _loading)
    tables = [line for section in sections for line in _lines(section, rows)]
    lines += [line for line in tables if line and not line.startswith(("#", "|---"))]
    return "\n".join(lines[:LINES]) + "\n"


def _lines(section: Callable[[Sequence[Row]], Iterator[str]], rows: Sequence[Row]) -> List[str]:
    """Return a section, or its error, so that the other sections are not lost."""
    try:
        return list(section(rows))
    except Exception as error:
        return ["", f"{section.__name__} failed: {type(error).__name__}: {error}"]


def _of(rows: Sequence[Row], stage: str, what: str = "") -> List[Row]:
    """Return the successful results of a stage whose name starts with `what`."""
    return [row for row in rows if row["stage"] == stage and row["what"].startswith(what) and row["ok"]]


def _one(rows: Sequence[Row], stage: str, what: str) -> Optional[Row]:
    return next(iter(_of(rows, stage, what)), None)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> List[str]:
    return ["", *table(header, rows, "markdown").rstrip().splitlines()] if rows else []


def _machine(rows: Sequence[Row]) -> Iterator[str]:
    yield from ("", "## Machine", "")
    machine = _one(rows, "machine", "machine")
    if machine is None:
        yield "Not recorded."
        return
    about = [machine["device"]]
    if "capability" in machine:
        about += [f"compute capability {machine['capability']}", f"{machine['memory_gb']} GB"]
        about += [f"{machine['multiprocessors']} multiprocessors", f"driver {machine['driver']}"]
    yield ", ".join(about)
    yield ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    yield f"commit {machine['commit']}"
    copy, product = _one(rows, "machine", "copy"), _one(rows, "machine", "matrix product")
    if copy and product:
        yield f"A large copy moves {copy['bytes_per_s'] / 1e12:.2f} TB/s (read and written)."
        yield f"A large {product['dtype']} product runs at {product['flops'] / 1e12:.0f} TFLOP/s."


def _kernels(rows: Sequence[Row]) -> Iterator[str]:
    found = [row for row in rows if row["stage"] == "kernels"]
    yield from ("", "## Kernels against the reference in float64", "")
    cases = [row for row in found if "case" in row]
    right = sum(row["ok"] for row in cases)
    yield f"{right} of {len(cases)} cases match the reference and are deterministic."
    worst = []
    for dtype in dict.fromkeys(row["dtype"] for row in cases):
        row = max((row for row in cases if row["dtype"] == dtype), key=lambda row: row["error"])
        worst.append([dtype, row["what"], row["worst"], f"{row['error']:.2g}", f"{row['allowed']:g}"])
    yield from _table(("dtype", "worst case", "of", "relative error", "allowed"), worst)
    steps = [
        [row["what"], f"{row['error']:.2g}", f"{row['reference_error']:.2g}"]
        for row in found
        if "reference_error" in row
    ]
    yield from _table(("losses against the recorded ones", "kernels", "reference"), steps)
    checks = [[row["what"], f"{row['check_s']:.2f}"] for row in found if "check_s" in row]
    yield from _table(("check before the first use", "seconds, after compilation"), checks)
    yield from _failures(found)


def _product(rows: Sequence[Row]) -> Iterator[str]:
    found = [row for row in rows if row["stage"] == "product"]
    yield from ("", "## Commands")
    states = [[row["what"], "right" if row["ok"] else "failed", f"{row.get('seconds', 0):.0f}"] for row in found]
    yield from _table(("command", "result", "seconds"), states)
    yield from _failures(found)


def _failures(rows: Sequence[Row]) -> Iterator[str]:
    for row in rows:
        if not row["ok"]:
            yield f"\nFAILED {row['what']}: {row.get('detail', '')}"


def _speed(rows: Sequence[Row]) -> Iterator[str]:
    yield from ("", "## Speed", "")
    yield "In the rows of PyramidTNT-S, PVT v2-B2 takes the place of timm's TNT, and Swin-T that of DeiT."
    cells = [
        [*what, *_figures(speeds, "images_per_s", ".0f"), *_figures(speeds, "median_ms", ".1f"), *_ratios(speeds, "images_per_s")]
        for what, speeds in _measurements(rows)
    ]  # fmt: skip
    header = ("what", "batch", "timm's TNT images/s", "ours", "DeiT", "timm's TNT ms", "ours", "DeiT")
    yield from _table((*header, "ours / timm's", "ours / DeiT"), cells)


def _memory(rows: Sequence[Row]) -> Iterator[str]:
    yield from ("", "## Memory of a step in MB, without model and optimizer")
    cells = [
        [*what, *_figures(speeds, "peak_mb", ",.0f"), *_ratios(speeds, "peak_mb")]
        for what, speeds in _measurements(rows)
    ]
    yield from _table(("what", "batch", "timm's TNT", "ours", "DeiT", "ours / timm's", "ours / DeiT"), cells)


def _measurements(rows: Sequence[Row]) -> Iterator[Tuple[List[str], List[Optional[Row]]]]:
    """Yield (what was measured and its batch size, the speeds of timm's TNT if it exists, of ours and of DeiT).

    For PyramidTNT, PVT v2 takes the place of timm's TNT, and Swin that of DeiT.
    """
    for row in _of(rows, "speed"):
        if "speeds" not in row:
            continue
        by_kind: Dict[str, Row] = {}
        for speed in row["speeds"]:
            name = speed["model"]
            is_deit, is_timms = name.startswith(("deit", "swin")), name.endswith("_224") or name.startswith("pvt")
            by_kind["DeiT" if is_deit else "timm" if is_timms else "ours"] = speed
        how = "torch.compile" if row["compiled"] else "eager"
        what = f"{row['group']}, {'training step' if row['mode'] == 'train' else 'inference'}, {how}"
        yield [what, str(row["batch_size"])], [by_kind.get(kind) for kind in ("timm", "ours", "DeiT")]


def _figures(speeds: Sequence[Optional[Row]], figure: str, form: str) -> List[str]:
    return [format(x[figure], form) if x else "-" for x in speeds]


def _ratios(speeds: Sequence[Optional[Row]], figure: str) -> List[str]:
    """Return ours / timm's and ours / DeiT's."""
    timm, ours, deit = speeds
    return [f"{ours[figure] / other[figure]:.2f}" if ours and other else "-" for other in (timm, deit)]


def _parts(rows: Sequence[Row]) -> Iterator[str]:
    yield from ("", "## Where the time of TNT-S goes, eager")
    cells = []
    for row in _of(rows, "speed", "parts"):
        total = sum(part["ms"] for part in row["parts"])
        for part in row["parts"]:
            shares = [f"{100 * x:.0f} %" for x in (part["ms"] / total, part["matmul_share"], part["bandwidth_share"])]
            cells.append([row["mode"], str(part["batch_size"]), part["part"], f"{part['ms']:.2f}", *shares])
    yield from _table(("mode", "batch", "part", "ms", "of all", "of matmul", "of bandwidth"), cells)


def _slowest_kernels(rows: Sequence[Row]) -> Iterator[str]:
    yield from ("", "## The kernels that take most of a training step of TNT-S, eager")
    found = _one(rows, "speed", "kernels of a step")
    kernels = found["kernels"] if found else []
    cells = [[f"`{x['kernel'][:70]}`", f"{x['ms']:.2f}", str(x["calls"])] for x in kernels]
    yield from _table(("kernel", "ms", "calls"), cells)


def _tuning(rows: Sequence[Row]) -> Iterator[str]:
    yield from ("", "## Tuning")
    cells = [
        [row["kernel"], str(row["width"]), str(len(row["tried"])), row["present"], f"{row['present_ms']:.3f}", row["best"],
         f"{row['best_ms']:.3f}", f"{row['present_ms'] / row['best_ms']:.2f}"]
        for row in rows if row["stage"] == "tuning" and "best" in row
    ]  # fmt: skip
    if cells:
        yield ""
        yield "Launch sizes are (words of a tile, warps, stages). Times are those of the whole forward, or of the whole"
        yield "backward with these sizes for one of its two kernels, for the words of 256 images."
    yield from _table(("kernel", "padded width", "tried", "present", "ms", "best", "ms", "gain"), cells)
    source = next(iter(_of(rows, "tuning", "table")[::-1]), None)
    if source:
        yield from ("", "```python", *source["source"].rstrip().splitlines(), "```")


def _loading(rows: Sequence[Row]) -> Iterator[str]:
    """Compare the throughput of the loader, of the model, and of both together."""
    yield from ("", "## Training from JPEG files")
    cells = [
        [row["what"], f"{row['images_per_s']:.0f}", f"{100 * row['data_wait']:.0f} %" if "data_wait" in row else "-"]
        for row in _of(rows, "loading")
        if "images_per_s" in row
    ]
    for what, (_, ours, _) in _measurements(rows):
        if ours and what[0].startswith("TNT-S, training step, eager"):
            cells.append([f"{what[0]}, batch {what[1]}, without a loader", f"{ours['images_per_s']:.0f}", "-"])
    yield from _table(("what", "images/s", "data wait"), cells)
    for row in _of(rows, "loading", "the device's part"):
        yield ""
        yield from _table(
            ("pixels", "batch", "ms for the augmentation on the device"),
            [[str(pixels), str(batch), f"{ms:.2f}"] for pixels, batch, ms in row.get("ms", ())],
        )
