"""Accuracy over a dataset: each image counts exactly once, and the result has the same bits on any number of ranks.

Each rank evaluates whole batches. The results of single images are gathered and put in dataset order before they are summed.
"""

from dataclasses import dataclass
from typing import Callable, ContextManager, Dict, List, Mapping, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tnt_timm.data.loader import Damage, EvaluationLoader
from tnt_timm.errors import UserError
from tnt_timm.runtime.distributed import World


@dataclass(frozen=True)
class Accuracy:
    """Top-1 and top-5 accuracy in percent, the mean cross entropy, and the number of images."""

    top1: float
    top5: float
    loss: float
    num_images: int


@dataclass(frozen=True)
class PerImageResults:
    """Tensors of shape (images,), in dataset order. A stream keeps the order in which it was read."""

    loss: Tensor  # cross entropy, float64
    top1: Tensor  # 1.0 if the most likely class is correct
    top5: Tensor  # 1.0 if one of the five most likely classes is correct
    target: Tensor  # int64
    predicted: Tensor  # most likely class, int64

    def accuracy(self) -> Accuracy:
        count = len(self.loss)
        top1, top5, loss = (values.sum().item() for values in (self.top1, self.top5, self.loss))
        return Accuracy(100 * top1 / count, 100 * top5 / count, loss / count, count)

    def confusion(self, num_classes: int) -> Tensor:
        """Return the number of images of each class (row) by predicted class (column): (classes, classes)."""
        pairs = self.target * num_classes + self.predicted
        return pairs.bincount(minlength=num_classes**2).reshape(num_classes, num_classes)


def evaluate(
    models: Mapping[str, nn.Module],
    loader: EvaluationLoader,
    world: World,
    autocast: Callable[[], ContextManager],
    on_batch: Callable[[int, int], None],
) -> Dict[str, Accuracy]:
    """Return the accuracy of each model. Arguments and errors are those of `evaluate_per_image`."""
    results = evaluate_per_image(models, loader, world, autocast, on_batch)
    return {name: result.accuracy() for name, result in results.items()}


def evaluate_per_image(
    models: Mapping[str, nn.Module],
    loader: EvaluationLoader,
    world: World,
    autocast: Callable[[], ContextManager],
    on_batch: Callable[[int, int], None],
    labels: Optional[Tensor] = None,
) -> Dict[str, PerImageResults]:
    """Evaluate several models (for example raw and averaged weights) in one pass over the data.

    Args:
        models: by name. They are left in evaluation mode.
        loader: the validation set.
        world: this rank among all ranks.
        autocast: makes the precision context of a forward pass.
        on_batch: called after each batch with the number of finished batches and of all batches on this rank.
        labels: (images, classes), bool: all correct classes of each image, at least one. The loader's targets are then
            row numbers, and the loss is that of the total probability of the correct classes. By default, an image has
            one correct class, its target.

    Returns:
        The results of each model, the same on every rank.

    Raises:
        UserError: an image is damaged, or a stream has another number of images than it should have.
    """
    for model in models.values():
        model.eval()
    indices, damaged, total = [torch.empty(0, dtype=torch.int64)], [], len(loader)
    rows = {name: [torch.empty(0, 5, dtype=torch.float64, device=world.device)] for name in models}
    with torch.inference_mode():
        for number, batch in enumerate(loader, 1):
            damaged += batch.damaged
            indices.append(batch.indices)
            for name, model in models.items():
                with autocast():
                    logits = model(batch.images)
                classes = torch.stack([batch.targets, logits.argmax(dim=1)], dim=1)
                rows[name].append(torch.cat([_scores(logits.float(), batch.targets, labels).double(), classes], dim=1))
            on_batch(number, total)

    local = {name: torch.cat(batches).cpu() for name, batches in rows.items()}  # sync
    all_damaged, all_indices, all_rows = zip(*world.gather((damaged, torch.cat(indices), local)))
    order = _dataset_order([damage for rank in all_damaged for damage in rank], torch.cat(all_indices), loader)
    results = {}
    for name in models:
        loss, top1, top5, target, predicted = torch.cat([rank[name] for rank in all_rows])[order].unbind(1)
        results[name] = PerImageResults(loss, top1, top5, target.long(), predicted.long())
    return results


def _scores(logits: Tensor, targets: Tensor, labels: Optional[Tensor]) -> Tensor:
    """Return loss, top-1 and top-5 of each image: (B, classes) -> (B, 3)."""
    top = logits.topk(min(5, logits.shape[1]), dim=1).indices
    if labels is None:
        loss = F.cross_entropy(logits, targets, reduction="none")
        correct = top == targets[:, None]
    else:
        labels = labels.to(logits.device)[targets]
        loss = logits.logsumexp(1) - logits.masked_fill(~labels, -torch.inf).logsumexp(1)
        correct = labels.gather(1, top)
    return torch.stack([loss, correct[:, 0].to(loss), correct.any(dim=1).to(loss)], dim=1)


def _dataset_order(damaged: List[Damage], indices: Tensor, loader: EvaluationLoader) -> Tensor:
    """Return the permutation that sorts the images, after checking that each one was evaluated exactly once."""
    if damaged:
        first, *others = damaged
        more = f" (and {len(others)} more: {', '.join(damage.name for damage in others[:3])})" if others else ""
        raise UserError(
            f"{first.name}: damaged validation image: {first.reason}{more}; replace or remove it: no accuracy is computed "
            f"from the other {loader.num_images - len(damaged)} of {loader.num_images} images",
            everywhere=True,
        )
    if len(indices) != loader.num_images:
        raise UserError(
            f"val_num_samples: the stream has {len(indices)} instead of {loader.num_images} validation images; "
            "replace missing shards or correct the number",
            everywhere=True,
        )
    order = indices.argsort(stable=True)
    if (indices >= 0).all() and not torch.equal(indices[order], torch.arange(len(order))):
        raise AssertionError("an image was evaluated twice")
    return order
