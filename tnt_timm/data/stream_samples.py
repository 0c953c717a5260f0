"""Samples of a dataset that can only be read from its start (`wds/...`), in the order in which a worker reads them.

timm's reader logs a damaged image or shard and skips it, and skips a label of -1. Here images are decoded, and all of these are
reported, as in other datasets. To do so, this module replaces the decoding stage of the reader's pipeline and the handler of its
errors, as timm 1.0.31 builds them. The tests notice when timm changes that.
"""

import io
import json
from functools import partial
from typing import Any, Dict, Iterable, Iterator, List, Optional, Tuple

import numpy as np
import torch
from PIL import Image
from timm.data.readers.reader_wds import log_and_continue
from timm.data.readers.targets import get_field, has_field
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from tnt_timm.data.datasets import Damage, StreamSet
from tnt_timm.data.decoding import DamagedImage, Decoder
from tnt_timm.data.device_augment import DeviceAugment
from tnt_timm.data.seeding import seed_everything
from tnt_timm.data.transforms import Transform
from tnt_timm.errors import UserError, one_line

UNREADABLE = 100  # damaged images at the start of a stream, after which all of it counts as unreadable


def blank_like(transform: Transform) -> Tensor:
    """Return zeros in the shape of a transformed image, as a placeholder for a damaged one."""
    return torch.zeros_like(transform(Image.new("RGB", (64, 64))))


class StreamedSamples(IterableDataset):
    """(uint8 image, target, damage) for training, or (uint8 image, target, -1, damage) for evaluation.

    With `augment`, its draw for the image comes second.

    Args:
        stream: the dataset.
        transform: of each image.
        seed: of the training run, or None for evaluation, where nothing is random and no image is replaced.
        rank, world_size: this rank among all. Each reads shards of its own.
        augment: draws what the device does to a training image. None is off.
    """

    def __init__(
        self,
        stream: StreamSet,
        transform: Transform,
        seed: Optional[int],
        rank: int,
        world_size: int,
        augment: Optional[DeviceAugment] = None,
    ):
        self.stream = stream
        self.transform = transform
        self.augment = augment
        self.seed = seed
        self.rank = rank
        self.unreadable = ""  # the first shard that cannot be read, and why
        stream.reader.dist_rank, stream.reader.dist_num_replicas = rank, world_size

    def __iter__(self) -> Iterator[Tuple[Any, ...]]:
        worker = get_worker_info()
        reader = self.stream.reader
        reader._lazy_init()  # the reader now knows its worker
        key = (self.seed or 0, reader.epoch_count.value, self.rank, worker.id if worker else 0)
        # timm's order would depend on the epochs read before: rebuild the pipeline with a seed for this epoch
        reader.worker_seed = int(np.random.SeedSequence(key).generate_state(1)[0])
        reader.ds = None
        reader._lazy_init()
        *front, decode, rename = reader.ds.pipeline
        for stage in front:
            if getattr(stage, "kw", {}).get("handler") is log_and_continue:
                stage.kw["handler"] = self._note_shard
        reader.ds.pipeline = [*front, _DecodeOrReport(decode.args[0], self.stream), rename]
        return self._for_evaluation() if self.seed is None else self._for_training(key)

    def _note_shard(self, error: Exception) -> bool:
        """Handle the error of a shard: training goes on without the rest of it. webdataset adds its path to the arguments."""
        reason = ", ".join(dict.fromkeys(text for text in error.args if isinstance(text, str)))
        self.unreadable = self.unreadable or f"a shard cannot be read: {reason or type(error).__name__}; replace it"
        if self.seed is None:
            raise UserError(self.unreadable)
        return log_and_continue(error)

    def _for_evaluation(self) -> Iterator[Tuple[Tensor, int, int, List[Damage]]]:
        for image, target in self.stream.dataset:
            if isinstance(image, Damage):
                yield blank_like(self.transform), 0, -1, [image]
            else:
                yield self.transform(image), target, -1, []

    def _for_training(self, key: Tuple[int, ...]) -> Iterator[Tuple[Any, ...]]:
        for position, (image, target, damaged) in enumerate(self._replaced()):
            seed_everything(*key, position, 2)  # 2: a key that no batch has
            image = self.transform(image)
            yield (image, self.augment.draw(), target, damaged) if self.augment else (image, target, damaged)

    def _replaced(self) -> Iterator[Tuple[Image.Image, int, List[Damage]]]:
        """Replace damaged images by the next good one, and those at the end of the stream by the last."""
        damaged: List[Damage] = []
        good: Tuple[Any, ...] = ()
        for image, target in self.stream.dataset:
            if isinstance(image, Damage):
                damaged.append(image)
                if not good and len(damaged) == UNREADABLE:
                    break
                continue
            good = image, target
            yield *good, damaged
            yield from [(*good, [])] * len(damaged)
            damaged = []
        if self.unreadable and not good and not damaged:
            raise UserError(self.unreadable)
        if damaged and not good:
            name, reason = damaged[0]
            others = len({damage.name for damage in damaged}) - 1  # a short stream repeats its images
            raise UserError(f"{name}: this and the next {others} images of the stream cannot be read: {reason}")
        if damaged:
            yield *good, damaged
            yield from [(*good, [])] * (len(damaged) - 1)


class _DecodeOrReport:
    """The place of the reader's decoding stage. A damaged image passes as a Damage instead of an image.

    Args:
        timms: timm's decoder with its arguments, which name the fields of a sample.
        stream: with its labels and its decoder.
    """

    def __init__(self, timms: partial, stream: StreamSet):
        options = timms.keywords
        self.field = options["target_key"] or options["alt_label"]  # of the JSON of a sample; empty for its .cls file
        self.image_keys = options["image_key"].split(";")
        self.labels = stream.labels
        self.decoder: Decoder = stream.decoder

    def __call__(self, samples: Iterable[Dict[str, Any]]) -> Iterator[Dict[str, Any]]:
        for sample in samples:
            name = f"{sample.get('__url__')}: {sample.get('__key__')}"
            try:
                target = self.labels.index(self._label(sample), lambda name=name: name)
                key = next((key for key in self.image_keys if key in sample), self.image_keys[0])
                image = self.decoder(io.BytesIO(sample[key]))
            except KeyError as error:
                raise UserError(f"{name}: no {error.args[0]} in this sample; check input_key and target_key") from None
            except DamagedImage as error:
                image, target = Damage(name, one_line(error)), -1
            yield {self.image_keys[0]: image, "target": target}  # the next stage looks for one of the keys

    def _label(self, sample: Dict[str, Any]) -> Any:
        if not self.field:
            return sample["cls"]
        try:
            content = json.loads(sample["json"])
        except ValueError as error:
            raise DamagedImage(f"its JSON: {one_line(error)}") from None
        if not isinstance(content, dict) or not has_field(content, self.field):
            fields = ", ".join(map(str, content)) if isinstance(content, dict) else "none"
            raise UserError(f"target_key: no field {self.field!r} in {sample['__key__']}.json; fields: {fields}")
        return get_field(content, self.field)
