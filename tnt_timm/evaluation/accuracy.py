"""Accuracy in which every image counts once, with the same digits on any number of processes.

`evaluate` sums up what `judge` finds image by image. Batches are dealt out whole, per-image results are gathered, put in the
order of the data set, and only then summed.
"""

from dataclasses import dataclass
from typing import Callable, ContextManager, Dict, List, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tnt_timm.data.loader import Damage, EvaluationLoader
from tnt_timm.errors import UserError
from tnt_timm.runtime.distributed import World


@dataclass(frozen=True)
class Accuracy:
    """top1, top5 in percent; loss is the mean cross entropy; num_images is how many were counted."""

    top1: float
    top5: float
    loss: float
    num_images: int


@dataclass(frozen=True)
class Judgement:
    """Of each image, in the order of the data set (of a stream: as it came), all (images,)."""

    loss: Tensor  # cross entropy, float64
    top1: Tensor  # 1 where the most likely class is right
    top5: Tensor  # 1 where one of the five most likely is
    target: Tensor  # int64
    predicted: Tensor  # the most likely class, int64

    def accuracy(self) -> Accuracy:
        count = len(self.loss)
        top1, top5, loss = (values.sum().item() for values in (self.top1, self.top5, self.loss))
        return Accuracy(100 * top1 / count, 100 * top5 / count, loss / count, count)

    def confusion(self, num_classes: int) -> Tensor:
        """Images by class (rows) and prediction (columns), (classes, classes)."""
        pairs = self.target * num_classes + self.predicted
        return pairs.bincount(minlength=num_classes**2).reshape(num_classes, num_classes)


Score = Callable[[Tensor, Tensor], Tensor]  # logits (B, classes), targets (B,) -> (B, 3): loss, top-1, top-5


def one_right_class(logits: Tensor, targets: Tensor) -> Tensor:
    """Whether the target is the highest logit, or among the highest five."""
    losses = F.cross_entropy(logits, targets, reduction="none")
    ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == targets[:, None]
    return torch.stack([losses, ranked[:, 0].to(losses), ranked.any(dim=1).to(losses)], dim=1)


def any_right_class(labels: Tensor) -> Score:
    """Whether the highest logit, or one of the highest five, is one of several right classes.

    Args:
        labels: (images, classes), bool, at least one right class in each row. A target is the number of a row. The loss is
            that of the right classes' common probability.
    """

    def score(logits: Tensor, targets: Tensor) -> Tensor:
        right = labels.to(logits.device)[targets]
        losses = logits.logsumexp(1) - logits.masked_fill(~right, -torch.inf).logsumexp(1)
        ranked = right.gather(1, logits.topk(min(5, logits.shape[1]), dim=1).indices)
        return torch.stack([losses, ranked[:, 0].to(losses), ranked.any(dim=1).to(losses)], dim=1)

    return score


def evaluate(
    models: Mapping[str, nn.Module],
    loader: EvaluationLoader,
    world: World,
    autocast: Callable[[], ContextManager],
    on_batch: Callable[[int, int], None] = lambda done, total: None,
    score: Score = one_right_class,
) -> Dict[str, Accuracy]:
    """Accuracy of several models (as the raw and the averaged weights), in one pass over the data; as `judge`."""
    found = judge(models, loader, world, autocast, on_batch, score)
    return {name: judgement.accuracy() for name, judgement in found.items()}


def judge(
    models: Mapping[str, nn.Module],
    loader: EvaluationLoader,
    world: World,
    autocast: Callable[[], ContextManager],
    on_batch: Callable[[int, int], None] = lambda done, total: None,
    score: Score = one_right_class,
) -> Dict[str, Judgement]:
    """What several models make of each image, in one pass over the data.

    Args:
        models: by name; left in evaluation mode.
        loader: the validation set.
        world: this process among all.
        autocast: makes the precision context of a forward pass.
        on_batch: called with batches done and in all on this process.
        score: what counts as right.

    Returns:
        One Judgement per model, the same on every process.

    Raises:
        UserError: damaged images (named), or images missing from a stream: accuracy on the rest would be another figure.
    """
    for model in models.values():
        model.eval()
    scores: Dict[str, List[Tensor]] = {name: [] for name in models}  # per batch: (B, 5)
    indices: List[Tensor] = []
    damaged: List[Damage] = []
    total = len(loader)
    with torch.inference_mode():
        for number, batch in enumerate(loader, 1):
            damaged += batch.damaged
            indices.append(batch.indices)
            for name, model in models.items():
                with autocast():
                    logits = model(batch.images)
                answer = torch.stack([batch.targets, logits.argmax(dim=1)], dim=1)
                scores[name].append(torch.cat([score(logits.float(), batch.targets).double(), answer], dim=1))
            on_batch(number, total)

    gathered = world.gather((damaged, {name: _rows(indices, batches) for name, batches in scores.items()}))
    damaged = [damage for part, _ in gathered for damage in part]
    _refuse_damage(damaged, loader)
    return {name: _in_order(torch.cat([part[name] for _, part in gathered]), loader) for name in models}


def _rows(
    indices: List[Tensor], scores: List[Tensor]
) -> Tensor:  # (images, 6): index, loss, top-1, top-5, target, predicted
    if not scores:
        return torch.empty(0, 6, dtype=torch.float64)
    return torch.cat([torch.cat(indices).double()[:, None], torch.cat(scores).double().cpu()], dim=1)  # sync


def _refuse_damage(damaged: List[Damage], loader: EvaluationLoader) -> None:
    if damaged:
        first = damaged[0]
        more = f" (and {len(damaged) - 1} more: {', '.join(d.name for d in damaged[1:4])})" if len(damaged) > 1 else ""
        raise UserError(
            f"{first.name}: damaged validation image: {first.reason}{more}; mend or remove it: "
            f"accuracy is not computed on the other {loader.num_images - len(damaged)} of {loader.num_images} images",
            everywhere=True,
        )


def _in_order(rows: Tensor, loader: EvaluationLoader) -> Judgement:
    count = len(rows)
    if count != loader.num_images:
        raise UserError(
            f"{count} of {loader.num_images} validation images could be read; "
            f"accuracy is not computed on something else: mend the data set",
            everywhere=True,
        )
    if count == 0:
        raise UserError("the validation set holds no images", everywhere=True)
    index, loss, top1, top5, target, predicted = rows[rows[:, 0].argsort(stable=True)].unbind(1)
    if index[0] >= 0 and not torch.equal(index, torch.arange(count, dtype=index.dtype)):
        raise AssertionError("an image was counted twice")
    return Judgement(loss, top1, top5, target.long(), predicted.long())
