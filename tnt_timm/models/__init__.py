"""The networks: tnt.py is TNT itself."""

from tnt_timm.models.tnt import TNT

__all__ = ["TNT"]
