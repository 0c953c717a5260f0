"""The settings for validation that a checkpoint keeps of its run, checked, because it may come from anyone (SECURITY.md).

A file can name data only in a folder of this machine, which is said before it is read. It cannot name a program, an address or
a pickle, nor ask for the resources of a whole machine.
"""

import logging
import re
from pathlib import Path
from typing import Any, Dict, Mapping

from tnt_timm.errors import UserError

_logger = logging.getLogger(__name__)
DATA = ("dataset", "data_dir", "class_map")
PLAIN = """val_split val_num_samples input_key target_key batch_size validation_batch_size workers crop_pct interpolation mean
    std device threads amp amp_dtype tf32""".split()
MOST = dict(batch_size=8192, validation_batch_size=8192, workers=64, threads=1024)
SPLIT = re.compile(r"[\w+-][\w.+-]*(\[[\w:%+-]*\])?")  # a folder's name, or a part of a split as Hugging Face writes it


def run_settings(config: object, place: str, given: Mapping[str, Any]) -> Dict[str, Any]:
    """Return a checkpoint's settings for validation.

    Args:
        config: as the file has it.
        place: name of the file.
        given: settings of the user; the file's own values of these are not looked at.

    Raises:
        UserError: one is nothing that a file may ask for. The message says which flag overrides it.
    """
    if not isinstance(config, Mapping):
        return {}
    settings = {key: config[key] for key in (*DATA, *PLAIN) if config.get(key) is not None and key not in given}
    if "batch_size" in given:
        settings.pop("validation_batch_size", None)
    for key, most in MOST.items():
        if isinstance(settings.get(key), (int, float)) and settings[key] > most:
            raise _refused(place, key, settings[key], f"is more than a file may ask for ({most})")
    if not SPLIT.fullmatch(str(settings.get("val_split", "validation"))):
        raise _refused(place, "val_split", settings["val_split"], "is not a plain name")
    for key in DATA:
        if not isinstance(settings.get(key, ""), str):
            raise _refused(place, key, settings[key], "is not text")
    if (given.get("dataset") or settings.get("dataset", "")).lower().partition("/")[0] == "digits":
        return {**settings, "data_dir": "", "class_map": ""}
    _check_data(settings, place)
    return settings


def _check_data(settings: Mapping[str, Any], place: str) -> None:
    """Check that a file names only folders, and a text file, of this machine, and say that they are read."""
    name, folder, class_map = (settings.get(key, "") for key in DATA)
    is_hugging_face = name.lower().startswith("hfds/")
    if is_hugging_face and not Path(name[5:]).is_dir():
        raise _refused(place, "dataset", name, "is not a folder of this machine")
    if folder and not Path(folder).is_dir():
        raise _refused(place, "data_dir", folder, "is not a folder of this machine")
    if class_map and not (class_map.lower().endswith(".txt") and Path(class_map).is_file()):
        raise _refused(place, "class_map", class_map, "is not a .txt file of this machine")
    for path in filter(None, (name[5:] if is_hugging_face else "", folder, class_map)):
        _logger.info("reading %s, which %s names", path, place)


def _refused(place: str, key: str, value: object, why: str) -> UserError:
    return UserError(f"{place}: {key}: {str(value)[:200]!r} {why}; pass --{key.replace('_', '-')}")
