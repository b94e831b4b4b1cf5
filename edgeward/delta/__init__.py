"""Deltas between two versions of a file: the smallest of several, found by measuring.

`make` is for who has both, `apply` for who has the base and a delta that nobody vouches for: its output
is nothing until its SHA-256 has been compared with the signed one.
"""

from edgeward.delta.applying import apply, stream
from edgeward.delta.frame import Codec, DeltaError
from edgeward.delta.making import WORTH, Delta, make

__all__ = ["WORTH", "Codec", "Delta", "DeltaError", "apply", "make", "stream"]
