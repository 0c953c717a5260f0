"""Results of many models in a .csv file with timm's columns, plus a .csv.json file that tells which results are up to date.

The .csv.json file records what timm's columns do not: the dataset that all rows share and, for each row, the settings, the
weights and the row itself. A row that was edited or written by another program does not match its record.
"""

import csv
import hashlib
import json
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional

import timm

from tnt_timm import atomic_files
from tnt_timm.checkpoints.open_model import weights_file
from tnt_timm.console import table
from tnt_timm.errors import UserError
from tnt_timm.settings import config
from tnt_timm.settings.schema import TrainConfig

COLUMNS = "model top1 top1_err top5 top5_err param_count img_size crop_pct interpolation".split()
DATA = "dataset data_dir val_split val_num_samples class_map input_key target_key".split()
SETTINGS = "img_size crop_pct interpolation mean std amp amp_dtype tf32".split()


def describe_data(settings: TrainConfig, test_set: str, num_images: int) -> Dict[str, Any]:
    """Return what identifies a validation set."""
    given = config.flat(settings)
    data = {key: given[key] for key in DATA}
    if data["data_dir"]:
        data["data_dir"] = str(Path(data["data_dir"]).resolve())
    return {**data, "test_set": test_set, "images": num_images}


def describe_measurement(name: str, settings: TrainConfig, use_ema: Optional[bool]) -> Dict[str, Any]:
    """Return what an accuracy depends on besides the data: the weights and the settings that override the model's own.

    `name` is a run folder, a checkpoint or a model name. Raises UserError if a folder has no checkpoint.
    """
    given = config.flat(settings)
    return {**{key: given[key] for key in SETTINGS}, "use_ema": use_ema, "weights": _weights(name)}


def _weights(name: str) -> str:
    """Return the checksum of a file of weights, else the address of published weights, else the name."""
    if Path(name.removeprefix("local-dir:")).exists():
        digest = hashlib.sha256()
        with weights_file(name).open("rb") as file:
            for chunk in iter(lambda: file.read(1 << 20), b""):
                digest.update(chunk)
        return f"sha256:{digest.hexdigest()}"
    published = timm.get_pretrained_cfg(name) if timm.is_model(name.split(".")[0]) else None
    return (published and (published.hf_hub_id or published.url)) or name


class ResultsFile:
    """A results file (which need not exist yet) and its records. All ranks read it, one writes it.

    Raises:
        UserError: `path` is another kind of file.
    """

    def __init__(self, path: Path):
        self.path = path
        self.records_path = path.with_name(path.name + ".json")
        self.rows = _read_rows(path)
        self.data: Dict[str, Any] = {}
        self.records: Dict[str, Dict[str, Any]] = {}  # by name: the "row", and what it was measured "with"

    def resume(self, data: Mapping[str, Any]) -> None:
        """Read the records, and set the dataset of all rows to the result of `describe_data`.

        Raises:
            UserError: the file has rows of another dataset, or rows without readable records.
        """
        self.data = dict(data)
        if not self.rows:
            return
        try:
            known = json.loads(self.records_path.read_text())
            changed = _differences(known["data"], self.data)
            self.records = {
                name: {"row": dict(x["row"]), "with": dict(x["with"])} for name, x in known["models"].items()
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise UserError(
                f"results_file: {self.path}: {self.records_path.name}, which records the dataset of its rows, is missing "
                "or damaged; choose another file"
            ) from None
        if changed:
            raise UserError(
                f"results_file: {self.path}: its rows are from another dataset: {changed}; choose another file"
            )

    def why_again(self, name: str, measurement: Mapping[str, Any]) -> Optional[str]:
        """Return why a model must be measured (again): "" if it has no row yet, None if its row is up to date."""
        row = next((row for row in self.rows if row["model"] == name), None)
        if row is None:
            return ""
        record = self.records.get(name, {})
        if record.get("row") != row:
            return f"{self.records_path} has no record of this row"
        return _differences(record["with"], measurement) or None

    def add(self, row: Dict[str, str], measurement: Mapping[str, Any]) -> None:
        """Add or replace a model's row. The rows stay sorted by accuracy, the best first."""
        self.rows = [other for other in self.rows if other["model"] != row["model"]] + [row]
        self.rows.sort(key=lambda row: -float(row["top1"]))
        self.records[row["model"]] = {"row": row, "with": dict(measurement)}

    def write(self) -> None:
        """Write both files. A row written without its record, because of a crash in between, would be measured again."""
        models = {row["model"]: self.records[row["model"]] for row in self.rows if row["model"] in self.records}
        atomic_files.replace_text(self.records_path, json.dumps({"data": self.data, "models": models}, indent=1) + "\n")
        atomic_files.replace_text(self.path, table(COLUMNS, [[*row.values()] for row in self.rows], "csv"))


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    return ", ".join(
        "the weights have changed" if key == "weights" else f"{key} was {before.get(key)!r} and is {now.get(key)!r}"
        for key in {**before, **now}
        if before.get(key) != now.get(key)
    )


def _read_rows(path: Path) -> List[Dict[str, str]]:
    if not path.exists():
        return []
    try:
        with path.open(newline="", encoding="utf-8", errors="surrogateescape") as text:
            header, *lines = csv.reader(text)
        rows = [dict(zip(COLUMNS, line, strict=True)) for line in lines]
        for row in rows:
            float(row["top1"])
        if header != COLUMNS:
            raise ValueError
    except (OSError, ValueError, csv.Error):
        raise UserError(
            f"results_file: {path}: not a results file (columns {','.join(COLUMNS)}); choose another file"
        ) from None
    return rows
