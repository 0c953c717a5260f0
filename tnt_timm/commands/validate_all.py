"""Validate many: `python scripts/validate_all.py output/tnt_s 'deit_*' --data-dir DIR --results-file results.csv`.

Each is validated as validate.py does it. The file is in the layout of timm's results, best first, and written after each
model; a row that holds is not measured again, so the same command goes on where it was stopped.
"""

import os
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import timm

from tnt_timm.commands import validate
from tnt_timm.commands.runner import run
from tnt_timm.console import say
from tnt_timm.errors import ConfigError, UserError, one_line
from tnt_timm.evaluation import validation
from tnt_timm.evaluation.results_table import ResultsFile, describe_data, describe_measurement
from tnt_timm.runtime.distributed import World, world
from tnt_timm.settings import command_line, config

DESCRIPTION = """Validate many models on one validation set and write a .csv file in the layout of timm's results. MODEL is a run
folder, a checkpoint of this project, a name of timm's (with its published weights), a pattern of such names in quotes, or a
.txt file of these, one per line. A model that is in the file already is validated again only if its weights or the settings are
others (FILE.csv.json remembers them); one that fails is named and left out, and the exit status is then 1."""
OWN = {key: validate.Own.model_fields[key] for key in ("results_file", "test_set", "use_ema")}
OF_ONE_MODEL = {"model", "model_kwargs", "pretrained", "pretrained_path", "num_classes", "gp"}
SETTINGS = {key: config.FIELDS[key] for key in validation.SETTINGS if key not in OF_ONE_MODEL}


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Returns the exit status."""
    return run(validate_all, argv)


def validate_all(argv: Sequence[str]) -> None:
    """Run the command line.

    Raises:
        UserError: the data cannot be used, or a model failed; the others' results are written by then.
    """
    names, given, own = _parse(argv)
    settings = config.validate(given, dict.fromkeys(given, "command line"))
    failed: List[str] = []
    with world(settings.compute.device) as here:
        with here.together():  # all have read the file before one of them writes it
            file = ResultsFile(Path(own.results_file))
            validation_set = validation.open_validation_set(settings.data, own.test_set)
            file.resume(describe_data(settings, own.test_set, len(validation_set.images)))
        for name in names:
            try:
                with here.together():
                    measurement = describe_measurement(name, settings, own.use_ema)
                why = file.why_again(name, measurement)
                if why is None:
                    _say(here, f"{name}: is in {file.path} already")
                    continue
                if why:
                    _say(here, f"{name}: measured again: {why}")
                row = _row(name, given, validation_set, here, own.use_ema)
            except Exception as error:  # a model may fail in its own way, and the others shall be validated
                if here.size > 1 and not isinstance(error, UserError):
                    raise  # the other processes may not have failed
                failed.append(name)
                _say(here, f"failed: {name}: {one_line(error)}")
                continue
            file.add(row, measurement)
            here.on_main(file.write)
            _say(here, "{model}: top-1 {top1}  top-5 {top5}".format(**row))
    if failed:
        raise UserError(f"{len(failed)} of {len(names)} models failed: {', '.join(failed)}", everywhere=True)


def _say(here: World, text: str) -> None:
    if here.is_main:
        say(text)


def _row(
    name: str, given: Dict[str, Any], validation_set: validation.ValidationSet, here: World, use_ema: Any
) -> Dict[str, str]:
    with here.together():
        if os.path.exists(name):
            source = validation.model_source(given, name)
        else:
            source = validation.model_source({**given, "model": name, "pretrained": True}, None)
    results, found = validation.validate_model(source, validation_set, here, use_ema)
    accuracy = results.accuracy()
    return {
        "model": name,
        "top1": f"{accuracy.top1:.3f}",
        "top1_err": f"{100 - accuracy.top1:.3f}",
        "top5": f"{accuracy.top5:.3f}",
        "top5_err": f"{100 - accuracy.top5:.3f}",
        "param_count": f"{found['param_count']:.2f}",
        "img_size": str(found["img_size"]),
        "crop_pct": f"{found['crop_pct']:.3f}",
        "interpolation": found["interpolation"],
    }


def _parse(argv: Sequence[str]) -> Tuple[List[str], Dict[str, Any], validate.Own]:
    sections = {"What to validate": OWN, "How; these settings win over the checkpoints'": SETTINGS}
    parser = command_line.build_parser(sections, DESCRIPTION, {"batch_size": ["-b"], "workers": ["-j"]}, defaults=False)
    parser.usage = "%(prog)s MODEL [MODEL ...] --data-dir DIR --results-file FILE.csv [--KEY VALUE ...]"
    parser.add_argument(
        "models", metavar="MODEL", nargs="+", help="run folder, checkpoint, name, 'pattern' or .txt file"
    )
    given = command_line.parse(parser, argv)
    names = list(dict.fromkeys(name for item in given.pop("models") for name in _names(item)))
    own = validate.own_settings({key: given.pop(key) for key in OWN if key in given})
    if not own.results_file:
        raise ConfigError("command line: results_file: missing; say with --results-file where the results shall go")
    if not Path(own.results_file).parent.is_dir():
        raise ConfigError(f"command line: results_file: {own.results_file}: no such folder")
    if not (given.get("data_dir") or given.get("dataset")):
        raise ConfigError("command line: data_dir: missing; say with --data-dir or --dataset what to validate on")
    return names, given, own


def _names(item: str) -> List[str]:
    if item.endswith(".txt"):
        if not Path(item).is_file():
            raise ConfigError(f"command line: {item}: no such file")
        lines = map(str.strip, Path(item).read_text().splitlines())
        return [name for line in lines if line and not line.startswith("#") for name in _names(line)]
    if os.path.exists(item):
        path = os.path.relpath(item)
        return [os.path.abspath(item) if path.startswith(".") else path]  # one name, however it is typed
    if "*" in item:
        names = timm.list_models(item, pretrained=True)
        if not names:
            raise ConfigError(f"command line: {item}: no model with published weights has such a name")
        return names
    config.check_model_name(item, "command line")
    return [item]
