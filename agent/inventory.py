"""What this device is: found out here, not configured.

onnxruntime is never imported into the agent's own process, where it would stay with its 30 MB: a child
process that ends is asked for its providers, once per version.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

from agent import hardware
from agent.runtime import delegates
from agent.runtime.installed import installed
from edgeward.storage import write_atomic
from edgeward.wire.reports import Accelerator, Inventory

log = logging.getLogger(__name__)

_LABELS = (
    "kubernetes.io/arch",
    "kubernetes.io/hostname",
    "node.kubernetes.io/instance-type",
    "topology.kubernetes.io/zone",
)
_ASK = "import json, onnxruntime; print(); print(json.dumps(onnxruntime.get_available_providers()))"
_ASK_SECONDS = 60.0


def find(folder: Path | None = None, root: Path = Path("/")) -> Inventory:
    """Facts of the machine and, inside a cluster, of its Node.

    `folder` keeps what is slow to find out; `root` is the file system to look at.
    """
    node, in_cluster = node_facts()
    runtimes = installed()
    local, handed_out = hardware.accelerators(root), {item.kind for item in in_cluster}
    return Inventory(
        architecture=platform.machine(),
        cpus=os.cpu_count() or 0,
        memory_bytes=psutil.virtual_memory().total,
        runtimes=runtimes,
        providers=onnx_providers(runtimes.get("onnx", ""), folder),
        # The Node counts those that a device plugin hands out; the kernel shows them, and others, too.
        accelerators=[*in_cluster, *(item for item in local if item.kind not in handed_out)],
        node=node,
        soc=hardware.soc(root),
        drivers=hardware.drivers(root),
        delegates=delegates.found(root) if "tflite" in runtimes else [],
    )


def onnx_providers(runtime: str, folder: Path | None) -> list[str]:
    """What the installed onnxruntime (`onnxruntime 1.20.0`) can run on; empty without it, or when it cannot be
    asked: the next start asks again."""
    if not runtime:
        return []
    runtime = f"{runtime} {_build()}"
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
        # Importing it may print, too.
        providers = [str(name) for name in json.loads(done.stdout.splitlines()[-1])]
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        log.error("%s cannot be asked for its providers: %s", runtime, error)
        return []
    if kept is not None:
        try:
            write_atomic(kept, json.dumps({"runtime": runtime, "providers": providers}).encode())
        except OSError as error:
            log.warning("onnxruntime's providers cannot be kept: %s", error)
    return providers


def _build() -> str:
    """Tells another build of the same version: several distributions bring the module onnxruntime."""
    spec = importlib.util.find_spec("onnxruntime")
    try:
        return str(Path(spec.origin).stat().st_mtime_ns) if spec is not None and spec.origin else ""
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
