"""The two commands, from their arguments to an exit status. Mistakes are one line on stderr, without a traceback."""

import contextlib
import math
import os
import sys
from typing import List, Optional, Sequence

from tnt_timm.checkpoints import run_folder
from tnt_timm.commands.runner import run
from tnt_timm.console import say
from tnt_timm.data.loader_processes import shortages, usable_cores
from tnt_timm.errors import UserError, one_line
from tnt_timm.runtime.distributed import World, env_rank, world
from tnt_timm.runtime.precision import set_up_torch
from tnt_timm.runtime.stopping import StopRequest
from tnt_timm.runtime.watchdog import Watchdog
from tnt_timm.settings import config as config_module
from tnt_timm.settings.schema import TrainConfig
from tnt_timm.training.build import Parts, build
from tnt_timm.training.run import TrainingRun
from tnt_timm.training.schedule import ema_decay
from tnt_timm.training.tasks import describe_teacher


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Returns the exit status."""
    return run(train, argv)


def train(argv: Sequence[str]) -> None:
    config, notices, print_only = config_module.resolve(argv)
    if print_only:
        sys.stdout.write(config_module.to_yaml(config))
        return
    stop = StopRequest()
    watchdog = Watchdog(f"rank {env_rank()}", 60 * config.run.hang_minutes)
    with contextlib.ExitStack() as stack:
        stack.enter_context(stop.listening())
        stack.enter_context(watchdog.watching())
        with stop.ending_at_once():
            here = stack.enter_context(world(config.compute.device))
        for notice in notices if here.is_main else ():
            say(f"notice: {notice}")
        _train_here(config, here, stop, watchdog)


def _train_here(config: TrainConfig, here: World, stop: StopRequest, watchdog: Watchdog) -> None:
    """Train in this process of the run. What it builds is gone when the processes part, as `world` wants it."""
    set_up_torch(config.compute, here.device)
    folder = run_folder.path_of(config)
    with stop.ending_at_once(), here.together():
        parts = build(config, here, continuing=bool(run_folder.candidates(folder, config)))
        if here.is_main:
            lock = run_folder.prepare(folder)  # noqa: F841  (held until the run ends)
            _print_head(config, parts, here)
    cores = len(set().union(*here.gather(usable_cores())))
    lines = [*_remains(config, parts), *_shortages(config, parts, here, cores)]
    for line in lines if here.is_main else ():
        say(f"warning: {line}")
    try:
        TrainingRun(config, parts, here, folder, stop, watchdog).train()
    except RuntimeError as error:
        if "does not have a deterministic implementation" not in str(error):
            raise
        raise UserError(f"deterministic: {one_line(error, 90)}; pass --no-deterministic", everywhere=True) from None


def _shortages(config: TrainConfig, parts: Parts, here: World, cores: int) -> List[str]:
    batch_size = max(config.data.batch_size, config.data.validation_batch_size or 0)
    batch_bytes = batch_size * math.prod(parts.preprocessing["input_size"])  # uint8
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", here.size))
    return shortages(config.data.workers, processes, cores, batch_bytes)


def _splits(config: TrainConfig, parts: Parts) -> str:
    """What the data set itself calls its splits, where it has names of its own."""
    names = [getattr(images, "split", "") for images in (parts.train_set, parts.eval_loader.images)]
    return f" ({' and '.join(names)})" if config.data.dataset.startswith("torch/") and all(names) else ""


def _remains(config: TrainConfig, parts: Parts) -> List[str]:
    """Data sets that are smaller than they were published: a download or unpacking was cut off."""
    found = [images for images in (parts.train_set, parts.eval_loader.images) if getattr(images, "published", None)]
    return [
        f"{images.label} has {len(images):,} images and not the published {images.published:,}; is {config.data.data_dir} whole?"
        for images in found
        if len(images) != images.published
    ]


def _print_head(config: TrainConfig, parts: Parts, here: World) -> None:
    pace, size = parts.pace, parts.preprocessing["input_size"]
    parameters = [p.numel() for p in parts.model.parameters()]
    trained = sum(p.numel() for p in parts.model.parameters() if p.requires_grad)
    part = f" ({trained:,} trained, the others frozen)" if trained < sum(parameters) else ""
    data = config.data.dataset or config.data.data_dir
    processes = "process" if here.size == 1 else "processes"
    precision = f"{config.compute.amp_dtype} where autocast allows, else float32" if config.compute.amp else "float32"
    if here.device.type == "cuda":
        precision += f", TF32 {'on' if config.compute.tf32 else 'off'}"
    if config.compute.deterministic:
        precision += ", deterministic algorithms"
    ema = (
        f"{ema_decay(config.ema, pace.updates_per_epoch):.8g}{' after warm-up' if config.ema.model_ema_warmup else ''}"
    )
    if config.ema.model_ema_window is not None:
        ema += f" (a window of {config.ema.model_ema_window:g} epochs)"
    say(f"model      {config.network.model}, {sum(parameters):,} parameters{part}, input {size[1]}x{size[2]}")
    if config.distillation.kd_model_name:
        say(f"teacher    {describe_teacher(config.distillation, parts.task)}")
    say(
        f"data       {data}: {len(parts.train_set):,} training and {parts.eval_loader.num_images:,} validation images"
        f"{_splits(config, parts)}, {parts.model_kwargs['num_classes']} classes"
    )
    say(
        f"batch      {config.data.batch_size} per process x {here.size} {processes} x "
        f"{config.optimizer.grad_accum_steps} accumulation = {pace.global_batch} global batch, lr {pace.lr:g}"
    )
    more = pace.epochs - config.schedule.epochs
    length = f"{pace.epochs} epochs" + (f" ({config.schedule.epochs} + {more} of warm-up or cooldown)" if more else "")
    say(f"schedule   {length} of {pace.updates_per_epoch} updates; EMA {ema if parts.ema else 'off'}")
    say(f"precision  {precision} on {here.device}; evaluation counts every image once")
    for notice in parts.notices:
        say(f"notice: {notice}")
    say(f"output     {run_folder.path_of(config)}")
