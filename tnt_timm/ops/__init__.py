"""The inner transformer of a TNT block as one operator; this module picks the implementation.

There is one implementation today, the specification in plain PyTorch. A fused one takes its place here, behind the same
name and arguments, and the network is none the wiser.
"""

from tnt_timm.ops.reference import inner_transformer

__all__ = ["inner_transformer"]
