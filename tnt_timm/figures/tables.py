"""The tables that figures are drawn from: CSV files of other commands, and of other people."""

import csv
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

from tnt_timm.errors import UserError, one_line


def read_rows(path: Path, required: Sequence[str]) -> List[Dict[str, str]]:
    """The rows of a CSV file with a header; empty cells are empty texts.

    Raises:
        UserError: it cannot be read, lacks a required column, has no rows, or a row of another length.
    """
    lines = read_lines(path)
    header, rows = lines[0], lines[1:]
    missing = [name for name in required if name not in header]
    if missing:
        raise UserError(f"{path}: has no column {', '.join(missing)}; columns: {', '.join(header)}")
    if not rows:
        raise UserError(f"{path}: has a header and no rows")
    for number, row in enumerate(rows, start=2):
        if len(row) != len(header):
            raise UserError(f"{path}: line {number}: {len(row)} cells where the header has {len(header)}")
    return [dict(zip(header, row)) for row in rows]


def read_lines(path: Path) -> List[List[str]]:
    """The cells of a CSV file, without empty lines; at least one line.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = [[cell.strip() for cell in row] for row in csv.reader(file) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a readable table: {one_line(error)}") from None
    if not lines:
        raise UserError(f"{path}: is empty")
    return lines


def number(row: Dict[str, Any], column: str, path: Path) -> Optional[float]:
    """A cell as a number; None where it is empty or the column is not there.

    Raises:
        UserError: it holds something else.
    """
    text = row.get(column) or ""
    if text == "":
        return None
    try:
        return float(text)
    except ValueError:
        raise UserError(f"{path}: {column}: {text!r} is not a number") from None
