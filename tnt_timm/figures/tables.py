"""Read CSV tables."""

import csv
from pathlib import Path
from typing import Dict, List, Optional, Sequence

from tnt_timm.errors import UserError, one_line


def read_rows(path: Path, required: Sequence[str] = ()) -> List[Dict[str, str]]:
    """Return the rows of a CSV file with a header. Raise UserError if it is none, or lacks rows or a required column."""
    try:
        with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            reader = csv.DictReader(file)
            rows, header = list(reader), reader.fieldnames
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a readable table: {one_line(error)}") from None
    if not rows:
        raise UserError(f"{path}: has no rows below its header")
    missing = [name for name in required if name not in header]
    if missing:
        raise UserError(f"{path}: has no column {', '.join(missing)}; columns: {', '.join(header)}")
    for number, row in enumerate(rows, start=1):
        if None in row or None in row.values():  # how csv marks cells that are too many or missing
            raise UserError(f"{path}: row {number} has more or fewer cells than the header ({len(header)})")
    return rows


def number(row: Dict[str, str], column: str, path: Path) -> Optional[float]:
    """Return a cell as a number, None if it is empty or missing. Raise UserError if it holds something else."""
    text = row.get(column)
    try:
        return float(text) if text else None
    except ValueError:
        raise UserError(f"{path}: {column}: {text!r} is not a number") from None
