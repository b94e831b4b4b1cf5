"""How hot the device is: the hottest of the sensors that the kernel shows (hwmon, or else thermal zones)."""

from __future__ import annotations

import psutil


def hottest() -> float | None:
    """Degrees Celsius; None without a sensor that can be read."""
    try:
        found = psutil.sensors_temperatures()
    except (AttributeError, OSError):  # not every system has them
        return None
    return max((entry.current for entries in found.values() for entry in entries), default=None)
