"""The KLL sketches of trend rows, read safely.

Sketches come from devices, and datasketches' own reader ends the process on bytes that were made to do
so. The binary form (Apache DataSketches, KLL, 32-bit floats) is simple enough to read and check here:
a sketch is a set of values with weights, and several are merged by pooling them.
"""

from __future__ import annotations

import math
import struct

MAX_BYTES = 16 << 10
_FAMILY = 15
_SINGLE = 4
_FULL_LAYOUT = (5, 1)
_SINGLE_LAYOUT = (2, 2)


def read_sketch(data: bytes) -> list[tuple[float, int]] | None:
    """The values of a sketch with their weights; None when it is not one, or empty.

    Little-endian: preamble length, version, family, flags (1 byte each), k (2), m (1), unused (1); then
    the only item (4), or n (8), smallest k (2), number of levels (1), unused (1), where each level begins
    (4 each), minimum and maximum (4 each) and the items (4 each). Items of level i weigh 2^i.
    """
    if len(data) < 12 or len(data) > MAX_BYTES or data[2] != _FAMILY:
        return None
    if tuple(data[:2]) == _SINGLE_LAYOUT and data[3] & _SINGLE and len(data) == 12:
        (item,) = struct.unpack_from("<f", data, 8)
        return [(item, 1)] if math.isfinite(item) else None
    if tuple(data[:2]) != _FULL_LAYOUT or len(data) < 20:
        return None
    n, _, levels = struct.unpack_from("<QHB", data, 8)
    begin = 20 + 4 * levels + 8
    if levels == 0 or len(data) < begin or (len(data) - begin) % 4:
        return None
    bounds = list(struct.unpack_from(f"<{levels}I", data, 20))
    bounds.append(bounds[0] + (len(data) - begin) // 4)
    items = struct.unpack_from(f"<{(len(data) - begin) // 4}f", data, begin)
    if bounds != sorted(bounds) or not all(map(math.isfinite, items)):
        return None
    weighted: list[tuple[float, int]] = []
    for level in range(levels):
        low, high = bounds[level] - bounds[0], bounds[level + 1] - bounds[0]
        weighted += [(item, 1 << level) for item in items[low:high]]
    return weighted if sum(weight for _, weight in weighted) == n else None
