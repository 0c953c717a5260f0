"""Validate many models: `tnt-validate-all output/tnt_s 'deit_*' --data-dir DIR --results-file results.csv`.

Each model is validated as by tnt-validate. The results file has the layout of timm's results, best model first, and is written
after each model. Rows that are still valid are not measured again, so the same command resumes an interrupted one.
"""

import os
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import timm

from tnt_timm.commands.entry_point import run_on_ranks
from tnt_timm.commands.validate import Common
from tnt_timm.console import say
from tnt_timm.data.identity import identity_of
from tnt_timm.errors import ConfigError, UserError, one_line
from tnt_timm.evaluation import validation
from tnt_timm.evaluation.results_table import ResultsFile, describe_data, describe_measurement
from tnt_timm.runtime.distributed import World, choose_device, world
from tnt_timm.runtime.meeting import Meeting
from tnt_timm.runtime.same_start import REMEDY, facts_of_data, facts_of_rank
from tnt_timm.settings import config
from tnt_timm.settings.command_line import setting
from tnt_timm.settings.paths import PathText, expand_at
from tnt_timm.settings.schema import OutputFile

OF_ONE_MODEL = {"model", "model_kwargs", "pretrained", "pretrained_path", "num_classes", "gp"}


class Settings(Common):
    """Validate many models on one dataset and write a CSV file in the layout of timm's results. A MODEL is a run folder, a
    checkpoint of this project, a timm model name (with its published weights), a quoted pattern of such names, or a .txt file
    with one of these per line. A model that is in the file is measured again only if its weights or the settings have changed
    (FILE.csv.json stores them). A model that fails is reported and skipped, and the exit status is then 1."""

    models: List[PathText] = setting(
        about="run folders, checkpoints, model names, quoted patterns or .txt files", positional="MODEL"
    )
    results_file: OutputFile = setting(about="CSV file for the results", min_length=1)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Return the exit status."""
    return run_on_ranks(validate_all, argv)


def validate_all(argv: Sequence[str], meeting: Meeting) -> None:
    """Validate the models and write the results file.

    Raises:
        UserError: the data cannot be used, or a model failed; the other models' results are written first.
    """
    fields = {key: config.FIELDS[key] for key in validation.SETTINGS if key not in OF_ONE_MODEL}
    with meeting.together():
        own, given = config.read_with(
            Settings, argv, {"training settings; they override the checkpoints'": fields}, False
        )
        names = list(dict.fromkeys(name for item in own.models for name in _names(item)))
        if not (given.get("data_dir") or given.get("dataset")):
            raise ConfigError("command line: data_dir: missing; pass --data-dir or --dataset")
        settings = config.validate(given, dict.fromkeys(given, "command line"))
        device = choose_device(settings.compute.device, meeting.launch)
    if meeting.size > 1:
        facts = {**config.flat(settings), **own.model_dump(), "models": names}
        meeting.agree(facts_of_rank(facts, device), REMEDY)
    failed: List[str] = []
    with world(device, meeting) as here:
        tell = say if here.is_main else (lambda text: None)
        with here.together():  # every rank reads the file before rank 0 writes it
            file = ResultsFile(Path(own.results_file))
            validation_set = validation.open_validation_set(settings.data, own.test_set)
            file.resume(describe_data(settings, own.test_set, len(validation_set.images)))
        if here.size > 1:
            here.agree(facts_of_data(validation=identity_of(validation_set.images)), REMEDY)
        for name in names:
            try:
                with here.together():
                    measurement = describe_measurement(name, settings, own.use_ema)
                why = file.why_again(name, measurement)
                if why is None:
                    tell(f"{name}: is in {file.path} already")
                    continue
                if why:
                    tell(f"{name}: measured again: {why}")
                row = _row(name, given, validation_set, here, own.use_ema)
            except Exception as error:  # whatever a model raises, the others are validated
                if here.size > 1 and not isinstance(error, UserError):
                    raise  # the other ranks may not have failed
                failed.append(name)
                tell(f"failed: {name}: {one_line(error)}")
                continue
            file.add(row, measurement)
            here.on_main(file.write)
            tell("{model}: top-1 {top1}  top-5 {top5}".format(**row))
    if failed:
        raise UserError(f"{len(failed)} of {len(names)} models failed: {', '.join(failed)}", everywhere=True)


def _row(
    name: str, given: Dict[str, Any], validation_set: validation.ValidationSet, here: World, use_ema: Optional[bool]
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


def _names(item: str, lists: Tuple[str, ...] = ()) -> List[str]:
    """Return the models that an argument stands for, found in these lists."""
    if item.endswith(".txt"):
        if item in lists or not Path(item).is_file():
            raise ConfigError(f"command line: {item}: {'lists itself' if item in lists else 'no such file'}")
        lines = map(str.strip, Path(item).read_text().splitlines())
        return [
            name
            for line in lines
            if line and not line.startswith("#")
            for name in _names(expand_at(item, line), (*lists, item))
        ]
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
