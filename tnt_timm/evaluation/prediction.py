"""Predict the most probable classes of images by name, with the same preprocessing as validate.py."""

import json
from dataclasses import dataclass
from typing import Callable, ContextManager, List, Optional, Sequence, Tuple

import torch
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import nn
from tqdm import tqdm

from tnt_timm.console import table
from tnt_timm.data.loader import Damage, EvaluationLoader
from tnt_timm.errors import UserError


@dataclass(frozen=True)
class Prediction:
    class_name: str
    index: int  # of the logit
    probability: float


@dataclass(frozen=True)
class Predictions:
    """The results of all readable images, in the order of the images."""

    found: List[Tuple[str, List[Prediction]]]  # an image's name and its classes, the most probable first
    damaged: List[Damage]
    turned: int  # images whose EXIF rotation was not applied


def class_names(model: nn.Module, classes: Optional[Sequence[str]]) -> Optional[List[str]]:
    """Return the names of the logits: the checkpoint's classes, else ImageNet's if the number of classes matches, else None.

    WordNet IDs are followed by their words: `n01440764 tench, Tinca tinca`.

    Raises:
        UserError: there are more or fewer names than logits.
    """
    names = classes or model.pretrained_cfg.get("label_names")
    if not names:
        subset = infer_imagenet_subset(model)
        if not subset:
            return None
        names = ImageNetInfo(subset).label_names()
    if len(names) != model.num_classes:
        raise UserError(
            f"classes: the checkpoint names {len(names)} classes but its model has {model.num_classes}; "
            "give a checkpoint whose list of classes is right"
        )
    words = ImageNetInfo("imagenet-22k").label_descriptions(as_dict=True)
    return [f"{name} {words[name]}" if name in words else name for name in names]


def predict(
    model: nn.Module,
    loader: EvaluationLoader,
    names: Optional[Sequence[str]],
    top_k: int,
    autocast: Callable[[], ContextManager],
) -> Predictions:
    """Predict the most probable classes of each image.

    Args:
        model: on the loader's device.
        loader: over `NamedImages`.
        names: class names (default: the logits' indices).
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
            unreadable = {damage.name for damage in batch.damaged}
            with autocast():
                logits = model(batch.images)
            top = logits.float().softmax(dim=1).topk(top_k, dim=1)
            for image, *classes in zip(batch.indices.tolist(), top.indices.tolist(), top.values.tolist()):  # sync
                name = loader.images.name(image)
                if name not in unreadable:
                    found.append((name, [Prediction(names[i] if names else str(i), i, p) for i, p in zip(*classes)]))
            turned += int(batch.targets.sum())  # sync
    return Predictions(found, damaged, turned)


def as_text(found: Sequence[Tuple[str, Sequence[Prediction]]], format: str) -> str:
    """Format predictions as "table" (to read), "json" (a list of images) or "csv" (a row per image and class)."""
    if format == "json":
        entries = []
        for image, predictions in found:
            classes = [{"class": p.class_name, "index": p.index, "probability": p.probability} for p in predictions]
            entries.append({"image": image, "predictions": classes})
        return json.dumps(entries, indent=2) + "\n"
    rows = []
    for image, predictions in found:
        for rank, p in enumerate(predictions, 1):
            row = [image, str(rank), p.class_name, str(p.index), f"{p.probability:.6f}"]
            if format == "table":
                row[0] = image if rank == 1 else ""
                row[4] = f"{100 * p.probability:.2f} %".rjust(8)
            rows.append(row)
    return table(["image", "rank", "class", "index", "probability"], rows, format)
