"""Facts of the machine from /proc, /sys and /dev, without any vendor's library. Linux; elsewhere, little.

Every function takes the root of the file system. What cannot be read is left out.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator
from pathlib import Path

from edgeward.wire.reports import Accelerator

#: (vendor, product) on USB: before and after the Edge TPU runtime has loaded its firmware.
_CORAL_USB = frozenset({("1a6e", "089a"), ("18d1", "9302")})
#: Kernel modules whose version matters to what a compiled model may rely on.
_DRIVERS = (
    "amdgpu", "apex", "gasket", "hailo_pci", "i915", "intel_vpu", "nvgpu", "nvidia", "rknpu", "rocket", "xe",
)  # fmt: skip
#: Device file -> kind, named like the resource of a Kubernetes device plugin where there is one, and name.
_DEVICES = (
    ("dev/apex_*", "coral.ai/edgetpu", "Coral PCIe Accelerator"),
    ("dev/hailo*", "hailo.ai/h8", "Hailo"),
    ("dev/rknpu*", "rockchip.com/npu", "Rockchip NPU"),
    ("dev/accel/accel*", "npu", "NPU"),
    ("dev/kfd", "amd.com/gpu", "AMD GPU"),
)


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip("\0\n ")
    except OSError:
        return ""


def _matches(root: Path, pattern: str) -> Iterator[Path]:
    try:
        yield from sorted(root.glob(pattern))
    except OSError:
        return


def soc(root: Path = Path("/")) -> str:
    """The board or processor: `Raspberry Pi 5 Model B Rev 1.0`, `Intel(R) Core(TM) i5-8250U CPU @ 1.60GHz`."""
    for board in ("proc/device-tree/model", "sys/firmware/devicetree/base/model"):
        if model := _text(root / board):
            return model
    found: dict[str, str] = {}
    for line in _text(root / "proc/cpuinfo").splitlines():
        name, _, value = line.partition(":")
        if value.strip():
            found.setdefault(name.strip().lower(), value.strip())
    for name in ("model name", "hardware", "cpu model", "uarch"):
        if found.get(name):
            return " ".join(found[name].split())
    if found.get("cpu implementer"):
        return f"ARM {found['cpu implementer']}:{found.get('cpu part', '?')}"
    return platform.machine()


def drivers(root: Path = Path("/")) -> dict[str, str]:
    """Driver -> version. A driver of the kernel's own has the kernel's version, or none."""
    versions: dict[str, str] = {}
    kernel = _text(root / "proc/sys/kernel/osrelease")
    for name in _DRIVERS:
        module = root / "sys/module" / name
        try:
            loaded = module.is_dir()
        except OSError:
            loaded = False
        if loaded:
            versions[name] = _text(module / "version") or (f"kernel {kernel}" if kernel else "")
    if found := re.search(
        r"Kernel Module\D*?(?:for \S+\s+)?(\d+(?:\.\d+)+)", _text(root / "proc/driver/nvidia/version")
    ):
        versions["nvidia"] = found[1]
    return versions


def accelerators(root: Path = Path("/")) -> list[Accelerator]:
    """What could run a model besides the CPU, by kind and name."""
    return [
        *_nvidia(root),
        *_coral_usb(root),
        *(
            Accelerator(kind, f"{name} {path.name}")
            for pattern, kind, name in _DEVICES
            for path in _matches(root, pattern)
        ),
        *_gpus(root),
    ]


def _nvidia(root: Path) -> Iterator[Accelerator]:
    for path in _matches(root, "proc/driver/nvidia/gpus/*/information"):
        model = re.search(r"^Model:\s*(.+)$", _text(path), re.MULTILINE)
        yield Accelerator("nvidia.com/gpu", model[1].strip() if model else path.parent.name)


def _coral_usb(root: Path) -> Iterator[Accelerator]:
    for path in _matches(root, "sys/bus/usb/devices/*/idVendor"):
        if (_text(path), _text(path.with_name("idProduct"))) in _CORAL_USB:
            yield Accelerator("coral.ai/edgetpu", "Coral USB Accelerator")


def _gpus(root: Path) -> Iterator[Accelerator]:
    """GPUs with a render node, by the kernel driver's name; NVIDIA's own driver says more above."""
    for path in _matches(root, "dev/dri/renderD*"):
        uevent = _text(root / "sys/class/drm" / path.name / "device/uevent")
        driver = re.search(r"^DRIVER=(.+)$", uevent, re.MULTILINE)
        if driver is None or driver[1] != "nvidia":
            yield Accelerator("gpu", f"{driver[1]} {path.name}" if driver else path.name)
