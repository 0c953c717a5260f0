"""A .csv file of many models' accuracies in the layout of timm's results, and beside it what each row was measured on.

The layout has no place for the data, so `results.csv.json` says it: the data, which all rows share, and of each row the
settings, the weights, and the row itself, so that a row which somebody else wrote is known for one.
"""

import csv
import hashlib
import json
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional

import timm

from tnt_timm import files
from tnt_timm.checkpoints import file_format
from tnt_timm.console import table
from tnt_timm.errors import UserError
from tnt_timm.settings.schema import TrainConfig

COLUMNS = "model top1 top1_err top5 top5_err param_count img_size crop_pct interpolation".split()
DATA = "dataset data_dir val_split val_num_samples class_map input_key target_key".split()
HOW = "img_size crop_pct interpolation mean std amp amp_dtype tf32".split()


def describe_data(settings: TrainConfig, test_set: str, num_images: int) -> Dict[str, Any]:
    """What tells one validation set from another."""
    data = {key: getattr(settings.data, key) for key in DATA}
    if data["data_dir"]:
        data["data_dir"] = str(Path(data["data_dir"]).resolve())
    return {**data, "test_set": test_set, "images": num_images}


def describe_measurement(name: str, settings: TrainConfig, use_ema: Optional[bool]) -> Dict[str, Any]:
    """What else an accuracy depends on: the settings that win over the model's own, and its weights.

    Args:
        name: run folder, checkpoint, or a model's name.
        settings: of the command line.
        use_ema: of the command line.

    Raises:
        UserError: a folder without a checkpoint.
    """
    groups = (settings.network, settings.data, settings.compute)
    how = {key: getattr(group, key) for key in HOW for group in groups if hasattr(group, key)}
    return {**how, "use_ema": use_ema, "weights": _weights(name)}


def _weights(name: str) -> str:
    path = Path(name.removeprefix("local-dir:"))
    if path.exists():
        file = path / "model.safetensors" if name.startswith("local-dir:") else file_format.find(path)
        digest = hashlib.sha256()
        with file.open("rb") as content:
            while block := content.read(1 << 20):
                digest.update(block)
        return f"sha256:{digest.hexdigest()}"
    cfg = timm.get_pretrained_cfg(name) if timm.is_model(name.split(".")[0]) else None
    return (cfg and (cfg.hf_hub_id or cfg.url)) or name


class ResultsFile:
    """Such a file. Every process reads it, one writes it.

    Args:
        path: of the .csv file, which need not be there.

    Raises:
        UserError: it is another kind of file.
    """

    def __init__(self, path: Path):
        self.path = path
        self.beside = path.with_name(path.name + ".json")
        self.rows = _read(path)
        self.data: Dict[str, Any] = {}
        self.measured: Dict[str, Dict[str, Any]] = {}  # by name: `row`, and `with`, as `describe_measurement` says it

    def go_on(self, data: Mapping[str, Any]) -> None:
        """Say what the rows to come are measured on, as `describe_data` does.

        Raises:
            UserError: those that are there were measured on something else.
        """
        self.data = dict(data)
        if self.rows:
            self.measured = self._read_beside()

    def why_again(self, name: str, measurement: Mapping[str, Any]) -> Optional[str]:
        """Why a row has to be measured again: "" where there is none yet, None where it holds."""
        row = next((row for row in self.rows if row["model"] == name), None)
        if row is None:
            return ""
        known = self.measured.get(name, {})
        if known.get("row") != row:
            return f"what it was measured with is not in {self.beside}"
        differences = _differences(known["with"], measurement)
        return ", ".join(differences) or None

    def add(self, row: Dict[str, str], measurement: Mapping[str, Any]) -> None:
        """In the place of what there was of the model; the best row comes first."""
        self.rows = [other for other in self.rows if other["model"] != row["model"]]
        self.rows.append(row)
        self.rows.sort(key=lambda row: -float(row["top1"]))
        self.measured[row["model"]] = {"row": row, "with": dict(measurement)}

    def write(self) -> None:
        """Both files. Between the two a row does not agree with what is known of it, and would be measured again."""
        known = {row["model"]: self.measured[row["model"]] for row in self.rows if row["model"] in self.measured}
        files.replace_text(self.beside, json.dumps({"data": self.data, "models": known}, indent=1) + "\n")
        files.replace_text(self.path, table(COLUMNS, [[*row.values()] for row in self.rows], "csv"))

    def _read_beside(self) -> Dict[str, Dict[str, Any]]:
        try:
            known = json.loads(self.beside.read_text())
            data = dict(known["data"])
            models = {name: {"row": dict(x["row"]), "with": dict(x["with"])} for name, x in known["models"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise UserError(
                f"results_file: {self.path}: {self.beside.name}, which says what its rows were measured on, is missing "
                "or damaged; name another file"
            ) from None
        differences = _differences(data, self.data)
        if differences:
            raise UserError(
                f"results_file: {self.path}: its rows were measured on other data: {', '.join(differences)}; "
                "name another file"
            )
        return models


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> List[str]:
    return [
        "the weights are others" if key == "weights" else f"{key} was {before.get(key)!r} and is {now.get(key)!r}"
        for key in {**before, **now}
        if before.get(key) != now.get(key)
    ]


def _read(path: Path) -> List[Dict[str, str]]:
    if not path.exists():
        return []
    trouble = f"results_file: {path}: is no file of results ({','.join(COLUMNS)}); name another one"
    try:
        with path.open(newline="", encoding="utf-8") as text:
            header, *lines = csv.reader(text)
        rows = [dict(zip(COLUMNS, line)) for line in lines]
        [float(row["top1"]) for row in rows]
    except (OSError, ValueError, KeyError, csv.Error):
        raise UserError(trouble) from None
    if header != COLUMNS or any(len(line) != len(COLUMNS) for line in lines):
        raise UserError(trouble)
    return rows
