"""The networks: tnt.py is TNT itself, variants.py what of it is registered with timm."""

from tnt_timm.models.distilled import DistilledTNT
from tnt_timm.models.tnt import TNT

__all__ = ["TNT", "DistilledTNT"]
