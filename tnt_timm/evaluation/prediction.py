"""The most probable classes of images, by name. Images go the way of validate.py, so a probability is what it would see."""

import json
from dataclasses import dataclass
from typing import Any, Callable, ContextManager, Dict, List, Optional, Sequence, Tuple

import torch
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import nn
from tqdm import tqdm

from tnt_timm.console import table
from tnt_timm.data.loader import Damage, EvaluationLoader
from tnt_timm.errors import UserError


@dataclass(frozen=True)
class Prediction:
    """One class of an image's most probable ones."""

    class_name: str
    index: int  # of the logit
    probability: float


@dataclass(frozen=True)
class Predictions:
    """What was found, in the order of the images."""

    found: List[Tuple[str, List[Prediction]]]  # an image's name, and its classes, the most probable first
    damaged: List[Damage]
    turned: int  # photographs whose EXIF data says that they lie on their side


def class_names(model: nn.Module, classes: Optional[Sequence[str]]) -> Optional[List[str]]:
    """Names of the logits: the checkpoint's own list, or ImageNet's where the number of classes is one of ImageNet's.

    Names that are WordNet's numbers are followed by the words, as in `n01440764 tench, Tinca tinca`.

    Raises:
        UserError: as many names as logits are not there.
    """
    names = classes or model.pretrained_cfg.get("label_names")
    if not names:
        subset = infer_imagenet_subset(model)
        names = ImageNetInfo(subset).label_names() if subset else None
    if names is None:
        return None
    if len(names) != model.num_classes:
        raise UserError(f"the model has {model.num_classes} classes and the list of their names {len(names)}")
    words = ImageNetInfo("imagenet-22k").label_descriptions(as_dict=True)
    return [f"{name} {words[name]}" if name in words else name for name in names]


def predict(
    model: nn.Module,
    loader: EvaluationLoader,
    names: Optional[Sequence[str]],
    top_k: int,
    autocast: Callable[[], ContextManager],
) -> Predictions:
    """The most probable classes of each image.

    Args:
        model: with `num_classes` logits, on the loader's device.
        loader: over `NamedImages`.
        names: of the classes; without them a class is called by its index.
        top_k: classes per image, at most the model's.
        autocast: makes the precision context of a forward pass.
    """
    found: List[Tuple[str, List[Prediction]]] = []
    damaged: List[Damage] = []
    turned = 0
    model.eval()
    with torch.inference_mode():
        for batch in tqdm(loader, unit="batch", disable=None, leave=False):
            damaged += batch.damaged
            with autocast():
                logits = model(batch.images)
            top = logits.float().softmax(dim=1).topk(top_k, dim=1)
            unread = {damage.name for damage in batch.damaged}
            values, classes = top.values.tolist(), top.indices.tolist()  # sync
            for index, probabilities, indices in zip(batch.indices.tolist(), values, classes):
                name = loader.images.name(index)
                if name not in unread:
                    called = [names[i] if names else str(i) for i in indices]
                    found.append((name, list(map(Prediction, called, indices, probabilities))))
            turned += int(batch.targets.sum())  # sync
    return Predictions(found, damaged, turned)


def as_text(found: Sequence[Tuple[str, Sequence[Prediction]]], format: str) -> str:
    """The predictions as "table" (for people), "json" (a list of images) or "csv" (a row per image and class)."""
    if format == "json":
        return json.dumps([_as_dict(image, predictions) for image, predictions in found], indent=2) + "\n"
    header = ["image", "rank", "class", "index", "probability"]
    rows = [
        [image, str(rank), p.class_name, str(p.index), f"{p.probability:.6f}"]
        for image, predictions in found
        for rank, p in enumerate(predictions, 1)
    ]
    if format == "csv":
        return table(header, rows, "csv")
    for row in rows:
        row[4] = f"{100 * float(row[4]):.2f} %".rjust(8)
        row[0] *= row[1] == "1"  # an image's name once
    return table(header, rows)


def _as_dict(image: str, predictions: Sequence[Prediction]) -> Dict[str, Any]:
    return {
        "image": image,
        "predictions": [{"class": p.class_name, "index": p.index, "probability": p.probability} for p in predictions],
    }
