"""Write the report."""
from typing import NamedTuple
class Cost(NamedTuple):
    """Cost of a network for one image."""

    parameters: int
    multiply_adds: int
def write(*a): pass
