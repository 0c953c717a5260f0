"""The networks. tnt.py is TNT, pyramid_tnt.py is PyramidTNT, variants.py registers their variants with timm."""

from tnt_timm.models.distilled import DistilledTNT
from tnt_timm.models.pyramid_tnt import PyramidTNT
from tnt_timm.models.tnt import TNT

__all__ = ["TNT", "DistilledTNT", "PyramidTNT"]
