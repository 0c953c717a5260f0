"""TNT (Transformer in Transformer, arXiv 2103.00112) as a timm plugin: importing this registers the models with timm."""

from tnt_timm.models import variants as _variants  # noqa: F401  (the import is the registration)
from tnt_timm.version import __version__ as __version__
