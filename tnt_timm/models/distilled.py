"""TNT with DeiT's distillation token (arXiv 2012.12877, section 4) and a second head that learns from a teacher.

The token follows the class token and has its own sentence position. The TNT paper has no such variant. The interface is that
of timm's `VisionTransformerDistilled`, so timm's TokenDistillationTask accepts it.
"""

from typing import Optional, Tuple

import torch
from timm.layers import trunc_normal_
from torch import nn

from tnt_timm.models.tnt import TNT


class DistilledTNT(TNT):
    """TNT with a distillation token; takes the arguments of TNT, except global_pool='avg'.

    In training, after `set_distilled_training(True)`, it returns the logits of both heads, ((B, classes), (B, classes)).
    Otherwise it returns their mean.
    """

    NUM_PREFIX_TOKENS = 2  # class token, distillation token
    GLOBAL_POOLS = ("token", "")

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.dist_token = nn.Parameter(torch.zeros_like(self.cls_token))
        trunc_normal_(self.dist_token, std=0.02)
        self.distilled_training = False

    def prefix_tokens(self) -> torch.Tensor:
        """Return the tokens before the sentences, (1, 2, D)."""
        return torch.cat([self.cls_token, self.dist_token], dim=1)

    @torch.jit.ignore
    def set_distilled_training(self, enable: bool = True) -> None:
        self.distilled_training = enable

    @torch.jit.ignore
    def get_classifier(self) -> Tuple[nn.Module, nn.Module]:
        return self.head, self.head_dist

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Replace both heads by new ones for `num_classes` classes (0: no heads)."""
        super().reset_classifier(num_classes, global_pool)
        self.head_dist = self.new_head()

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Tokens (B, 2+N, D) -> logits (B, classes), or both heads' logits; with `pre_logits`, the mean of the tokens."""
        x_dist = x
        if self.global_pool == "token":
            x, x_dist = x[:, 0], x[:, 1]
        x, x_dist = self.head_drop(x), self.head_drop(x_dist)
        if not pre_logits:
            x, x_dist = self.head(x), self.head_dist(x_dist)
            if self.training and self.distilled_training and not torch.jit.is_scripting():
                return x, x_dist
        return (x + x_dist) / 2
