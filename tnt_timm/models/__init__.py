"""The networks. tnt.py is TNT, variants.py registers its variants with timm."""

from tnt_timm.models.distilled import DistilledTNT
from tnt_timm.models.tnt import TNT

__all__ = ["TNT", "DistilledTNT"]
