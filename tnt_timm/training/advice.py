"""What a user should know when a run starts: what the machine or the dataset lacks, and how images load faster."""

import math
import os
import platform
from typing import Dict, Iterator

from tnt_timm.data.datasets import StreamSet
from tnt_timm.data.workers import loading_remedy, shortages, usable_cores
from tnt_timm.runtime.distributed import World
from tnt_timm.settings.schema import TrainConfig
from tnt_timm.training.build import Parts, can_move_to_device


def resources(config: TrainConfig, parts: Parts, here: World) -> Dict[str, int]:
    """Return what loads images on this machine, as arguments of `shortages`."""
    machine = platform.node()
    cores = set().union(*(cores for name, cores in here.gather((machine, usable_cores())) if name == machine))
    batch_size = max(config.data.batch_size, config.data.validation_batch_size or 0)
    return dict(
        workers=config.data.workers,
        ranks=int(os.environ.get("LOCAL_WORLD_SIZE", here.size)),
        cores=len(cores),
        batch_bytes=batch_size * math.prod(parts.preprocessing["input_size"]),  # uint8
    )


def remedy_for_waiting(config: TrainConfig, parts: Parts, here: World, loading: Dict[str, int]) -> str:
    """Return what the user can do if a GPU waits for images."""
    if here.device.type != "cuda":
        return ""
    shards = parts.train_set.num_shards // here.size if isinstance(parts.train_set, StreamSet) else math.inf
    return loading_remedy(**loading, moves=can_move_to_device(config.augmentation, parts.preprocessing), shards=shards)


def warnings(config: TrainConfig, parts: Parts, here: World, loading: Dict[str, int]) -> Iterator[str]:
    """Yield what the user should fix: incomplete datasets, too few cores, too little memory, and slow settings."""
    for images in (parts.train_set, parts.eval_loader.images):
        published = getattr(images, "published", None)
        if published and len(images) != published:
            yield f"{images.label} has {len(images):,} of {published:,} images; download {config.data.data_dir} again"
    yield from shortages(**loading)
    if config.augmentation.on_device and here.device.type == "cpu":
        yield "augment_on: device is for GPUs; on a CPU, --augment-on worker is faster"
