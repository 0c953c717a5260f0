"""The names are registered with timm before any test asks for one."""

import tnt_timm  # noqa: F401
