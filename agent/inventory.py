"""What this device is: found out here, not configured.

onnxruntime is never imported into the agent's own process, where it would stay with its 30 MB: a child
process that ends is asked for its providers, once per version.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

from agent.runtime.installed import installed
from agent.runtime.tflite_delegates import found as tflite_delegates
from edgeward.storage import write_atomic
from edgeward.wire.reports import Accelerator, Inventory

log = logging.getLogger(__name__)

_LABELS = (
    "kubernetes.io/arch",
    "kubernetes.io/hostname",
    "node.kubernetes.io/instance-type",
    "topology.kubernetes.io/zone",
)
_ASK = "import json, onnxruntime; print(json.dumps(onnxruntime.get_available_providers()))"
_ASK_SECONDS = 60.0

#: USB vendor and product of the Coral accelerator, before and after its firmware is loaded.
_CORAL = {("1a6e", "089a"), ("18d1", "9302")}


def find(folder: Path | None = None, root: Path = Path("/")) -> Inventory:
    """Facts of the machine and, inside a cluster, of its Node.

    `folder` keeps what is slow to find out; `root` is the file system to look at.
    """
    node, in_cluster = node_facts()
    runtimes = installed()
    return Inventory(
        architecture=platform.machine(),
        cpus=os.cpu_count() or 0,
        memory_bytes=psutil.virtual_memory().total,
        runtimes=runtimes,
        providers=onnx_providers(runtimes.get("onnx", ""), folder),
        accelerators=[*in_cluster, *local_accelerators(root)],
        node=node,
        soc=soc(root),
        drivers=drivers(root),
        delegates=tflite_delegates() if "tflite" in runtimes else [],
    )


def onnx_providers(runtime: str, folder: Path | None) -> list[str]:
    """What the installed onnxruntime (`onnxruntime 1.20.0`) can run on; empty without it."""
    if not runtime:
        return []
    kept = folder / "providers.json" if folder is not None else None
    if kept is not None:
        try:
            known = json.loads(kept.read_bytes())
            if known["runtime"] == runtime:
                return [str(name) for name in known["providers"]]
        except (OSError, ValueError, KeyError, TypeError):
            log.debug("providers are asked for again")
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", _ASK],
            capture_output=True,
            timeout=_ASK_SECONDS,
            check=True,
            stdin=subprocess.DEVNULL,
        )
        providers = [str(name) for name in json.loads(done.stdout)]
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        log.error("%s cannot be asked for its providers: %s", runtime, error)
        return []
    if kept is not None:
        write_atomic(kept, json.dumps({"runtime": runtime, "providers": providers}).encode())
    return providers


def soc(root: Path = Path("/")) -> str:
    """The board's or the processor's name; what measurements on this device are valid for."""
    board = _text(root / "proc/device-tree/model").rstrip("\x00")
    if board:
        return board
    for line in _text(root / "proc/cpuinfo").splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("model name", "Model", "Hardware"):
            return value.strip()
    return platform.machine()


def drivers(root: Path = Path("/")) -> dict[str, str]:
    """Accelerator drivers by name, with their versions."""
    found = {}
    nvidia = _text(root / "proc/driver/nvidia/version").partition("Kernel Module")[2].split()
    if nvidia:
        found["nvidia"] = nvidia[0]
    for module in ("amdgpu", "apex", "gasket", "hailo_pci", "rknpu", "i915", "xe"):
        folder = root / "sys/module" / module
        if folder.is_dir():
            found[module] = _text(folder / "version").strip() or "present"
    return found


def local_accelerators(root: Path = Path("/")) -> list[Accelerator]:
    """What the kernel shows without any vendor's tool."""
    found = []
    for information in sorted((root / "proc/driver/nvidia/gpus").glob("*/information")):
        facts: dict[str, str] = {}
        for line in _text(information).splitlines():
            key, _, value = line.partition(":")
            facts[key.strip()] = value.strip()
        found.append(Accelerator("nvidia.com/gpu", facts.get("Model", "NVIDIA GPU")))
    for device in sorted((root / "sys/bus/usb/devices").glob("*")):
        ids = (_text(device / "idVendor").strip(), _text(device / "idProduct").strip())
        if ids in _CORAL:
            found.append(Accelerator("coral.ai/edgetpu", "Coral USB Accelerator"))
    for pattern, kind, name in (
        ("apex_*", "coral.ai/edgetpu", "Coral PCIe Accelerator"),
        ("hailo*", "hailo.ai/h8", "Hailo"),
        ("rknpu*", "rockchip.com/npu", "Rockchip NPU"),
        ("dri/renderD*", "gpu", "GPU"),
        ("kfd", "amd.com/gpu", "AMD GPU"),
    ):
        found += [Accelerator(kind, f"{name} {path.name}") for path in sorted((root / "dev").glob(pattern))]
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def node_facts() -> tuple[dict[str, str], list[Accelerator]]:
    """The agent's own Node through the Kubernetes API; nothing outside a cluster.

    A cluster that refuses to tell is logged and treated as none: inference does not depend on it.
    """
    name = os.environ.get("NODE_NAME", "")
    if not name or not os.environ.get("KUBERNETES_SERVICE_HOST"):
        return {}, []
    try:
        from kubernetes import client, config
    except ImportError:
        log.warning(
            "inside a cluster, but the kubernetes client is not installed: pip install 'edgeward[agent-k3s]'"
        )
        return {"name": name}, []
    try:
        config.load_incluster_config()  # type: ignore[no-untyped-call]  # the client leaves it untyped
        node: Any = client.CoreV1Api().read_node(name, _request_timeout=10)
    except Exception as error:  # noqa: BLE001  # the client raises urllib3, config and API errors without a common base
        log.warning(
            "cannot read node %s: %s",
            name,
            str(error).splitlines()[0] if str(error) else type(error).__name__,
        )
        return {"name": name}, []
    info, labels = node.status.node_info, node.metadata.labels or {}
    facts = {
        "name": name,
        "kubeletVersion": info.kubelet_version,
        "osImage": info.os_image,
        "kernelVersion": info.kernel_version,
        **{label: labels[label] for label in _LABELS if label in labels},
    }
    accelerators = [
        Accelerator(resource, labels.get(f"{resource}.product", ""))
        for resource, amount in (node.status.capacity or {}).items()
        if "/" in resource and not resource.startswith("kubernetes.io/")
        for _ in range(int(amount) if str(amount).isdigit() else 0)
    ]
    return facts, accelerators
