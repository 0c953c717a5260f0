"""Samples of a data set that can only be read from its start (`wds/...`), in the order in which a loader process meets them.

timm's reader logs a damaged image and leaves it out. Here it is reported, as in other data sets: so its decoding stage is
wrapped, which relies on how timm 1.0.31 builds the reader's pipeline; the tests notice when that changes.
"""

from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Tuple

import numpy as np
import torch
from PIL import Image
from timm.data.readers.reader_wds import ReaderWds, WdsTargetKeyError
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from tnt_timm.data.datasets import DAMAGE, Damage, StreamSet
from tnt_timm.data.seeding import seed_everything
from tnt_timm.errors import UserError, one_line


def blank_like(transform: Callable[[Image.Image], Tensor]) -> Tensor:
    """Zeros in the shape of a transformed image, to stand where a damaged one is reported."""
    return torch.zeros_like(transform(Image.new("RGB", (64, 64))))


class StreamedSamples(IterableDataset):
    """(uint8 image, target, damage) to train on, or (uint8 image, target, -1, damage) to evaluate on.

    Args:
        stream: the data set.
        transform: RGB image -> uint8 tensor.
        seed: of the training run; None to evaluate, where nothing is random and nothing is replaced.
        rank: this process among all.
    """

    def __init__(self, stream: StreamSet, transform: Callable[[Image.Image], Tensor], seed: Optional[int], rank: int):
        self.stream = stream
        self.transform = transform
        self.seed = seed
        self.rank = rank

    def __iter__(self) -> Iterator[Tuple[Any, ...]]:
        worker = get_worker_info()
        reader = self.stream.dataset.reader
        reader._lazy_init()  # here it learns which loader process it is in
        key = (self.seed or 0, reader.epoch_count.value, self.rank, worker.id if worker else 0)
        # timm's order would depend on the epochs read before: build the pipeline anew, with a seed of this epoch's own
        reader.worker_seed = int(np.random.SeedSequence(key).generate_state(1)[0])
        reader.ds = None
        reader._lazy_init()
        _report_damage(reader)
        return self._to_evaluate() if self.seed is None else self._to_train(key)

    def _to_evaluate(self) -> Iterator[Tuple[Tensor, int, int, List[Damage]]]:
        for image, target in self.stream.dataset:
            if isinstance(image, Damage):
                yield blank_like(self.transform), 0, -1, [image]
            else:
                yield self.transform(image), target, -1, []

    def _to_train(self, key: Tuple[int, ...]) -> Iterator[Tuple[Tensor, int, List[Damage]]]:
        position, owed, good = 0, [], None
        for image, target in self.stream.dataset:
            if isinstance(image, Damage):
                owed.append(image)
                continue
            good = image, target
            for _ in range(1 + len(owed)):  # the good image stands for the damaged ones before it
                yield self._sample(*good, key, position, owed)
                position, owed = position + 1, []
        for _ in owed if good is not None else ():
            yield self._sample(*good, key, position, owed)
            position, owed = position + 1, []

    def _sample(self, image: Image.Image, target: int, key: Tuple[int, ...], position: int, damaged: List[Damage]):
        seed_everything(*key, position, 2)  # 2: apart from the batches' keys
        return self.transform(image), target, damaged


def _report_damage(reader: ReaderWds) -> None:
    *front, decode, rename = reader.ds.pipeline
    reader.ds.pipeline = [*front, _DecodeOrReport(decode.args[0]), rename]


class _DecodeOrReport:
    """The reader's decoding stage; a damaged image goes on as a Damage in the image's place."""

    def __init__(self, decode: Callable[[Dict[str, Any]], Optional[Dict[str, Any]]]):
        self.decode = decode

    def __call__(self, samples: Iterable[Dict[str, Any]]) -> Iterator[Dict[str, Any]]:
        for sample in samples:
            name = f"{sample.get('__url__')}: {sample.get('__key__')}"
            try:
                decoded = self.decode(sample)
            except WdsTargetKeyError as error:
                raise UserError(f"target_key: {one_line(error)}") from None
            except KeyError as error:
                raise UserError(f"{name}: no {error.args[0]} in this sample; see input_key and target_key") from None
            except DAMAGE as error:
                decoded = dict(jpg=Damage(name, one_line(error)), target=-1)
            if decoded is not None:
                yield decoded
