"""What a device finds out about itself, on trees as real devices have them."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import sys
from pathlib import Path

import msgspec
import onnxruntime
import pytest

from agent import hardware, inventory
from agent.inventory import onnx_providers
from agent.runtime import delegates
from agent.runtime.installed import installed
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
        ({"proc/cpuinfo": "nonsense"}, platform.machine()),
        ({}, platform.machine()),
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
        Accelerator("nvidia.com/gpu", "NVIDIA A2"),
        Accelerator("coral.ai/edgetpu", "Coral USB Accelerator"),
        Accelerator("coral.ai/edgetpu", "Coral USB Accelerator"),
        Accelerator("coral.ai/edgetpu", "Coral PCIe Accelerator apex_0"),
        Accelerator("hailo.ai/h8", "Hailo hailo0"),
        Accelerator("rockchip.com/npu", "Rockchip NPU rknpu"),
        Accelerator("npu", "NPU accel0"),
        Accelerator("gpu", "i915 renderD128"),
        Accelerator("gpu", "renderD130"),
    ]
    assert hardware.accelerators(root / "nowhere") == []


def test_find_reads_the_tree_that_it_is_given(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NODE_NAME", raising=False)
    write(root, {"proc/device-tree/model": "Board", "dev/hailo0": "", "sys/module/hailo_pci/version": "4.18"})
    found = inventory.find(root=root)
    assert (found.soc, found.drivers) == ("Board", {"hailo_pci": "4.18"})
    assert found.accelerators == [Accelerator("hailo.ai/h8", "Hailo hailo0")]


def test_an_older_inventory_is_still_read() -> None:
    old = {"architecture": "aarch64", "cpus": 4}
    assert msgspec.convert(old, Inventory) == Inventory(architecture="aarch64", cpus=4)


def test_find_does_not_load_the_runtimes_into_this_process() -> None:
    check = (
        "import sys, agent.daemon, agent.commands; from agent import inventory; found = inventory.find(); "
        "print(found.providers); "
        "print([name for name in ('onnxruntime', 'ai_edge_litert', 'tflite_runtime') if name in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    providers, loaded = answer.stdout.splitlines()
    assert "CPUExecutionProvider" in providers
    assert "onnxruntime" not in loaded
    assert "tflite" not in loaded
    assert "litert" not in loaded


def test_what_the_node_hands_out_is_not_counted_twice(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(
        root,
        {"proc/driver/nvidia/gpus/0000:01:00.0/information": "Model: NVIDIA A2\n", "dev/hailo0": ""},
    )
    counted = Accelerator("nvidia.com/gpu", "NVIDIA-A2")
    monkeypatch.setattr(inventory, "node_facts", lambda: ({"name": "n"}, [counted]))
    assert inventory.find(root=root).accelerators == [counted, Accelerator("hailo.ai/h8", "Hailo hailo0")]


def test_the_module_onnxruntime_may_come_from_another_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its version, neither its providers nor what was measured would be asked for after an update."""

    def version(name: str) -> str:
        if name == "onnxruntime-gpu":
            return "1.31.0"
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert installed()["onnx"] == "onnxruntime-gpu 1.31.0"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The children that were started."""
    started: list[object] = []
    run = subprocess.run

    def counted(command: list[str], **options: object) -> object:
        started.append(command)
        return run(command, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(inventory.subprocess, "run", counted)
    return started


def test_the_answer_is_kept_for_one_version_and_build(
    asked: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = onnx_providers("onnxruntime 1.0", tmp_path)
    assert first == onnxruntime.get_available_providers()
    assert onnx_providers("onnxruntime 1.0", tmp_path) == first
    assert len(asked) == 1
    onnx_providers("onnxruntime 2.0", tmp_path)
    assert len(asked) == 2
    monkeypatch.setattr(inventory, "_build", lambda: "another")
    onnx_providers("onnxruntime 2.0", tmp_path)
    assert len(asked) == 3
    assert onnx_providers("", tmp_path) == []
    assert len(asked) == 3


@pytest.mark.parametrize("damage", ["{", '{"runtime": 1}', "[]", "\\xff"])
def test_a_damaged_answer_is_asked_for_again(asked: list[object], tmp_path: Path, damage: str) -> None:
    (tmp_path / "providers.json").write_text(damage)
    assert onnx_providers("onnxruntime 1.0", tmp_path) == onnxruntime.get_available_providers()
    assert len(asked) == 1


@pytest.mark.parametrize("ask", ["raise SystemExit(1)", "print('nonsense')", "pass", "import os; os.abort()"])
def test_a_runtime_that_cannot_be_asked_has_no_providers_and_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ask: str
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(inventory, "_ASK", ask)
        assert onnx_providers("onnxruntime 1.0", tmp_path) == []
    assert "CPUExecutionProvider" in onnx_providers("onnxruntime 1.0", tmp_path)


def test_a_runtime_that_hangs_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inventory, "_ASK_SECONDS", 0.2)
    monkeypatch.setattr(
        inventory, "_ASK", "import time; time.sleep(10); print('[\"LateExecutionProvider\"]')"
    )
    assert onnx_providers("onnxruntime 1.0", tmp_path) == []


def test_a_folder_that_cannot_be_written_costs_only_the_answer(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "CPUExecutionProvider" in onnx_providers("onnxruntime 1.0", tmp_path / "file" / "cache")


def test_delegates_are_those_whose_library_is_there(root: Path) -> None:
    write(root, {"usr/lib/aarch64-linux-gnu/libedgetpu.so.1": ""})
    assert delegates.found(root) == ["EdgeTPU", "XNNPACK"]
    assert delegates.found(root / "nowhere") == ["XNNPACK"]
