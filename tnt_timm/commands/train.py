"""Train: `torchrun train.py --config configs/tnt_s.yaml`."""

import contextlib
import sys
from functools import partial
from typing import Iterator, Optional, Sequence, Tuple

from tnt_timm.checkpoints import run_folder
from tnt_timm.commands.entry_point import run_on_ranks
from tnt_timm.console import say, show
from tnt_timm.errors import UserError, one_line
from tnt_timm.runtime.distributed import World, choose_device, world
from tnt_timm.runtime.hang_watchdog import Watchdog
from tnt_timm.runtime.meeting import Meeting
from tnt_timm.runtime.precision import set_up_torch
from tnt_timm.runtime.same_start import REMEDY, facts_of_rank
from tnt_timm.runtime.signals import StopRequest
from tnt_timm.settings import config as config_module
from tnt_timm.settings.schema import TrainConfig
from tnt_timm.training import advice
from tnt_timm.training.build import Parts, build
from tnt_timm.training.losses import describe_teacher
from tnt_timm.training.run import TrainingRun
from tnt_timm.training.schedule import ema_decay
from tnt_timm.training.trainer import Trainer


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Return the exit status."""
    stop = StopRequest()
    return run_on_ranks(partial(train, stop), argv, stop)


def train(stop: StopRequest, argv: Sequence[str], meeting: Meeting) -> None:
    """Train on every rank until the run is finished.

    Raises:
        UserError: a mistake in the settings, the data or a checkpoint.
        Stopped: a signal ended the run.
    """
    with stop.ending_at_once():
        with meeting.together():
            config, notices, print_only = config_module.resolve(argv)
            device = choose_device(config.compute.device, meeting.launch)
        if print_only:
            if meeting.is_main:
                show(config_module.to_yaml(config, ascii="utf" not in (sys.stdout.encoding or "").lower()))
            return
        if meeting.size > 1:
            meeting.agree(facts_of_rank(config_module.flat(config), device), REMEDY)
    watchdog = Watchdog(f"rank {meeting.rank}", 60 * config.run.hang_minutes)
    with contextlib.ExitStack() as stack:
        stack.enter_context(watchdog.watching())
        with stop.ending_at_once():
            here = stack.enter_context(world(device, meeting))
        for notice in notices if here.is_main else ():
            say(f"notice: {notice}")
        _train_here(config, here, stop, watchdog)


def _train_here(config: TrainConfig, here: World, stop: StopRequest, watchdog: Watchdog) -> None:
    """Train in this process. A function of its own, because `world` requires that the DDP model is gone when it ends."""
    set_up_torch(config.compute, here.device)
    folder = run_folder.path_of(config)
    with stop.ending_at_once(), here.together():
        parts = build(config, here, continuing=bool(run_folder.candidates(folder, config)))
        if here.is_main:
            lock = run_folder.prepare(folder)  # noqa: F841  (held until the run ends)
            for name, text in _summary(config, parts, here):
                say(f"{name:<11}{text}")
            for notice in parts.notices:
                say(f"notice: {notice}")
    loading = advice.resources(config, parts, here)
    for warning in advice.warnings(config, parts, here, loading) if here.is_main else ():
        say(f"warning: {warning}")
    remedy = advice.remedy_for_waiting(config, parts, here, loading)
    try:
        TrainingRun(Trainer(config, parts, here, folder, stop, watchdog, remedy)).train()
    except RuntimeError as error:
        if "does not have a deterministic implementation" not in str(error):
            raise
        raise UserError(f"deterministic: {one_line(error, 90)}; pass --no-deterministic", everywhere=True) from None


def _summary(config: TrainConfig, parts: Parts, here: World) -> Iterator[Tuple[str, str]]:
    """Yield the first lines of the log, as name and text: what the run computes, on which data, how and for how long."""
    network, data, compute, schedule, pace = config.network, config.data, config.compute, config.schedule, parts.pace
    total = sum(p.numel() for p in parts.model.parameters())
    trained = sum(p.numel() for p in parts.model.parameters() if p.requires_grad)
    frozen = f" ({trained:,} trained, the others frozen)" if trained < total else ""
    _, height, width = parts.preprocessing["input_size"]
    yield "model", f"{network.model}, {total:,} parameters{frozen}, input {height}x{width}"

    if config.distillation.kd_model_name:
        yield "teacher", describe_teacher(config.distillation, parts.task)

    train_set, eval_set = parts.train_set, parts.eval_loader.images
    images = f"{len(train_set):,} training and {parts.eval_loader.num_images:,} validation images"
    splits = f" ({train_set.split} and {eval_set.split})" if data.dataset.startswith("torch/") else ""
    classes = parts.model_kwargs["num_classes"]
    yield "data", f"{data.dataset or data.data_dir}: {images}{splits}, {classes} classes"

    processes = f"{here.size} {'process' if here.size == 1 else 'processes'}"
    factors = f"{data.batch_size} per process x {processes} x {config.optimizer.grad_accum_steps} accumulation"
    yield "batch", f"{factors} = {pace.global_batch} global batch, lr {pace.lr:g}"

    ema = "off"
    if parts.ema:
        ema = f"{ema_decay(config.ema, pace.updates_per_epoch):.8g}"
        ema += " after warm-up" if config.ema.model_ema_warmup else ""
        ema += f" (a window of {config.ema.model_ema_window:g} epochs)" if config.ema.model_ema_window else ""
    more = pace.epochs - schedule.epochs
    added = "further cycles, warm-up or cooldown" if schedule.lr_cycle_limit > 1 else "warm-up or cooldown"
    length = f"{pace.epochs} epochs" + (f" ({schedule.epochs} + {more} of {added})" if more else "")
    yield "schedule", f"{length} of {pace.updates_per_epoch} updates; EMA {ema}"

    precision = f"{compute.amp_dtype} where autocast allows, else float32" if compute.amp else "float32"
    if here.device.type == "cuda":
        precision += f", TF32 {'on' if compute.tf32 else 'off'}"
    if compute.deterministic:
        precision += ", deterministic algorithms"
    yield "precision", f"{precision} on {here.device}; evaluation counts every image once"
    yield "output", str(run_folder.path_of(config))
