"""The model API that timm expects of both networks besides the forward pass: heads, and loading with official names.

tnt_api.py and pyramid_api.py have what depends on the network: input sizes, layer groups and feature maps.
"""

from types import ModuleType
from typing import Optional, Tuple

import torch
from timm.layers import get_device_dtype
from torch import nn

from tnt_timm.models import convert_weights
from tnt_timm.models.arguments import check_choice
from tnt_timm.models.layers import Linear


class TimmModel(nn.Module):
    """Base class of the networks: an image classifier with `num_features` inputs of the head."""

    GLOBAL_POOLS: Tuple[str, ...]
    RELEASE: ModuleType  # the names of the official release; convert_weights.py says what such a module has

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Replace the head by a new one for `num_classes` classes (0: no head).

        Raises:
            ValueError: unknown global_pool.
        """
        if global_pool is not None:
            check_choice("global_pool", global_pool, self.GLOBAL_POOLS)
            self.global_pool = global_pool
        if num_classes < 0:
            raise ValueError(f"num_classes {num_classes} is below 0, which means no head")
        self.num_classes = num_classes
        self.head = self.new_head()

    def new_head(self) -> nn.Module:
        """Return an untrained head, in the precision and mode of the model."""
        if self.num_classes == 0:
            return nn.Identity()
        return Linear(self.num_features, self.num_classes, **get_device_dtype(self)).train(self.training)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors) -> None:
        """Accept the names of the official release in `load_state_dict`; torch calls this method."""
        self.RELEASE.rename_in_place(state_dict, prefix, self)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
        errors.extend(convert_weights.hint_to_adapt(state_dict, prefix, self))
