"""What a device says of itself, from file systems of other devices."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from agent import inventory
from edgeward.wire.reports import Accelerator


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_a_jetson_a_coral_and_a_plain_server(tmp_path: Path) -> None:
    jetson = tree(
        tmp_path / "jetson",
        {
            "proc/device-tree/model": "NVIDIA Jetson Orin Nano\x00",
            "proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX aarch64 Kernel Module  540.3.0  Tue\n",
            "proc/driver/nvidia/gpus/0000:01:00.0/information": "Model: \t NVIDIA Orin\nIRQ: 5\n",
        },
    )
    assert inventory.soc(jetson) == "NVIDIA Jetson Orin Nano"
    assert inventory.drivers(jetson) == {"nvidia": "540.3.0"}
    assert inventory.local_accelerators(jetson) == [Accelerator("nvidia.com/gpu", "NVIDIA Orin")]
    coral = tree(
        tmp_path / "coral",
        {
            "proc/cpuinfo": "processor\t: 0\nModel\t\t: Raspberry Pi 5 Model B\n",
            "sys/bus/usb/devices/2-1/idVendor": "18d1\n",
            "sys/bus/usb/devices/2-1/idProduct": "9302\n",
            "sys/bus/usb/devices/1-1/idVendor": "1d6b\n",
            "sys/module/apex/version": "1.1\n",
            "dev/apex_0": "",
        },
    )
    assert inventory.soc(coral) == "Raspberry Pi 5 Model B"
    assert inventory.drivers(coral) == {"apex": "1.1"}
    assert [item.name for item in inventory.local_accelerators(coral)] == [
        "Coral USB Accelerator",
        "Coral PCIe Accelerator apex_0",
    ]
    server = tree(tmp_path / "server", {"proc/cpuinfo": "model name\t: Some CPU @ 2 GHz\n"})
    assert inventory.soc(server) == "Some CPU @ 2 GHz"
    assert (inventory.drivers(server), inventory.local_accelerators(server)) == ({}, [])


def test_the_agents_process_never_imports_a_runtime() -> None:
    code = (
        "import sys, agent.daemon, agent.commands; from agent import inventory; found = inventory.find();"
        "print(found.providers); assert 'CPUExecutionProvider' in found.providers;"
        "assert not {'onnxruntime', 'ai_edge_litert', 'tensorflow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_providers_are_asked_for_once_per_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = inventory.onnx_providers("onnxruntime 1.0", tmp_path)
    assert "CPUExecutionProvider" in first
    monkeypatch.setattr(sys, "executable", "/nonexistent")
    assert inventory.onnx_providers("onnxruntime 1.0", tmp_path) == first
    assert inventory.onnx_providers("onnxruntime 2.0", tmp_path) == [], "another version is asked again"
    (tmp_path / "providers.json").write_text("rubbish")
    assert inventory.onnx_providers("onnxruntime 1.0", tmp_path) == []
    assert inventory.onnx_providers("", tmp_path) == []
