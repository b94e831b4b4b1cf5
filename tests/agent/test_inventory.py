"""What a device finds out about itself, on trees as real devices have them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
import onnxruntime
import pytest

from agent import hardware, inventory
from agent.runtime import available as module
from agent.runtime.available import available
from edgeward.wire.reports import Accelerator, Inventory

NVIDIA_VERSION = """\
NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024
GCC version:  gcc version 12.2.0 (Debian 12.2.0-14)
"""
NVIDIA_OPEN = """\
NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  540.3.0  Release Build  (buildbrain@mobile-u64)
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "root"


def write(root: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


@pytest.mark.parametrize(
    ("files", "name"),
    [
        (
            {
                "proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.0\0",
                "proc/cpuinfo": "processor\t: 0\nCPU implementer\t: 0x41\n",
            },
            "Raspberry Pi 5 Model B Rev 1.0",
        ),
        (
            {"proc/cpuinfo": "processor\t: 0\nmodel name\t: Intel(R) Core(TM)  i5-8250U CPU @ 1.60GHz\n"},
            "Intel(R) Core(TM) i5-8250U CPU @ 1.60GHz",
        ),
        ({"proc/cpuinfo": "processor\t: 0\nHardware\t: BCM2835\n"}, "BCM2835"),
        ({"proc/cpuinfo": "CPU implementer\t: 0x41\nCPU part\t: 0xd0b\n"}, "ARM 0x41:0xd0b"),
        ({"proc/cpuinfo": "nonsense"}, ""),
        ({}, ""),
    ],
)
def test_soc(root: Path, files: dict[str, str], name: str) -> None:
    write(root, files)
    assert hardware.soc(root) == name


@pytest.mark.parametrize(("text", "version"), [(NVIDIA_VERSION, "550.54.15"), (NVIDIA_OPEN, "540.3.0")])
def test_driver_versions(root: Path, text: str, version: str) -> None:
    write(
        root,
        {
            "proc/driver/nvidia/version": text,
            "sys/module/apex/version": "1.1\n",
            "sys/module/i915/srcversion": "ABC",
            "sys/module/snd/version": "9",
            "proc/sys/kernel/osrelease": "6.8.0-45-generic\n",
        },
    )
    assert hardware.drivers(root) == {"apex": "1.1", "i915": "kernel 6.8.0-45-generic", "nvidia": version}
    assert hardware.drivers(root / "nowhere") == {}


def test_accelerators(root: Path) -> None:
    write(
        root,
        {
            "proc/driver/nvidia/gpus/0000:01:00.0/information": "Model: \t\t NVIDIA A2\nIRQ:   \t\t 61\n",
            "sys/bus/usb/devices/1-1/idVendor": "1a6e\n",
            "sys/bus/usb/devices/1-1/idProduct": "089a\n",
            "sys/bus/usb/devices/1-2/idVendor": "18d1\n",
            "sys/bus/usb/devices/1-2/idProduct": "9302\n",
            "sys/bus/usb/devices/1-3/idVendor": "18d1\n",
            "sys/bus/usb/devices/1-3/idProduct": "4ee7\n",
            "sys/bus/usb/devices/1-4/idVendor": "1a6e\n",
            "dev/apex_0": "",
            "dev/hailo0": "",
            "dev/rknpu": "",
            "dev/accel/accel0": "",
            "dev/dri/card0": "",
            "dev/dri/renderD128": "",
            "dev/dri/renderD129": "",
            "dev/dri/renderD130": "",
            "sys/class/drm/renderD128/device/uevent": "DRIVER=i915\nPCI_CLASS=30000\n",
            "sys/class/drm/renderD129/device/uevent": "DRIVER=nvidia\n",
        },
    )
    assert hardware.accelerators(root) == [
        Accelerator("NVIDIA", "NVIDIA A2"),
        Accelerator("EdgeTPU", "Coral USB Accelerator"),
        Accelerator("EdgeTPU", "Coral USB Accelerator"),
        Accelerator("EdgeTPU", "apex_0"),
        Accelerator("Hailo", "hailo0"),
        Accelerator("RKNPU", "rknpu"),
        Accelerator("NPU", "accel0"),
        Accelerator("GPU", "i915 renderD128"),
        Accelerator("GPU", "renderD130"),
    ]
    assert hardware.accelerators(root / "nowhere") == []


def test_find_reads_the_tree_that_it_is_given(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NODE_NAME", raising=False)
    write(root, {"proc/device-tree/model": "Board", "dev/hailo0": "", "sys/module/hailo_pci/version": "4.18"})
    found = inventory.find(root=root)
    assert (found.soc, found.drivers) == ("Board", {"hailo_pci": "4.18"})
    assert found.accelerators == [Accelerator("Hailo", "hailo0")]


def test_an_older_inventory_is_still_read() -> None:
    old = {"architecture": "aarch64", "cpus": 4}
    assert msgspec.convert(old, Inventory) == Inventory(architecture="aarch64", cpus=4)


def test_find_does_not_load_the_runtimes_into_this_process() -> None:
    check = (
        "import sys; from agent import inventory; found = inventory.find(); print(found.providers); "
        "print([name for name in ('onnxruntime', 'ai_edge_litert', 'tflite_runtime', 'numpy') if name in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    providers, loaded = answer.stdout.splitlines()
    assert "CPUExecutionProvider" in providers
    assert "onnxruntime" not in loaded
    assert "tflite" not in loaded
    assert "litert" not in loaded


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The children that were started; nothing is known yet."""
    monkeypatch.setattr(module, "_known", {})
    started: list[list[str]] = []
    run = subprocess.run

    def counted(command: list[str], **options: object) -> object:
        started.append(command)
        return run(command, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(module.subprocess, "run", counted)
    return started


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_known", {})


def onnx_only(names: list[str]) -> list[str]:
    return [name for name in names if name.endswith("ExecutionProvider")]


def test_the_runtime_is_asked_once(asked: list[list[str]]) -> None:
    assert onnx_only(available()) == onnxruntime.get_available_providers()
    assert available() == available()
    assert len(asked) == 1


def test_the_answer_outlives_the_process(
    asked: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = available(tmp_path / "cache")
    forget(monkeypatch)
    assert available(tmp_path / "cache") == first
    assert len(asked) == 1


@pytest.mark.parametrize("change", ["version", "damaged", "gone", "wrong type"])
def test_another_version_or_a_damaged_answer_is_asked_again(
    asked: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    first = available(tmp_path)
    forget(monkeypatch)
    kept = tmp_path / "providers.json"
    if change == "version":
        monkeypatch.setattr(module, "installed", lambda: {"onnx": "onnxruntime 99", "tflite": "x 1"})
    elif change == "damaged":
        kept.write_bytes(kept.read_bytes()[:-5])
    elif change == "gone":
        kept.unlink()
    else:
        kept.write_text('{"version": 1, "providers": "all"}')
    assert available(tmp_path) == first
    assert len(asked) == 2


@pytest.mark.parametrize("ask", ["raise SystemExit(1)", "print('nonsense')", "pass", "import os; os.abort()"])
def test_a_runtime_that_cannot_be_asked_has_no_providers_and_is_asked_again(
    asked: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ask: str
) -> None:
    real = module._ASK
    monkeypatch.setattr(module, "_ASK", ask)
    assert onnx_only(available(tmp_path)) == []
    monkeypatch.setattr(module, "_ASK", real)
    assert "CPUExecutionProvider" in available(tmp_path)


def test_a_runtime_that_hangs_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forget(monkeypatch)
    monkeypatch.setattr(module, "_TIMEOUT", 0.2)
    monkeypatch.setattr(module, "_ASK", "import time; time.sleep(10); print('[\"LateExecutionProvider\"]')")
    assert onnx_only(available(tmp_path)) == []


def test_a_folder_that_cannot_be_written_costs_only_the_cache(
    asked: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    assert "CPUExecutionProvider" in available(tmp_path / "file" / "cache")


def test_delegates_are_those_whose_library_is_there(root: Path) -> None:
    write(root, {"usr/lib/aarch64-linux-gnu/libedgetpu.so.1": ""})
    assert [name for name in available(root=root) if not name.endswith("Provider")] == ["EdgeTPU", "XNNPACK"]
    assert [name for name in available(root=root / "x") if not name.endswith("Provider")] == ["XNNPACK"]
