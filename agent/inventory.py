"""What this device is: found out here, not configured."""

from __future__ import annotations

import logging
import os
import platform
from pathlib import Path
from typing import Any

import psutil

from agent import hardware
from agent.runtime.available import available
from agent.runtime.port import installed
from edgeward.wire.reports import Accelerator, Inventory

log = logging.getLogger(__name__)

_LABELS = (
    "kubernetes.io/arch",
    "kubernetes.io/hostname",
    "node.kubernetes.io/instance-type",
    "topology.kubernetes.io/zone",
)


def find(folder: Path | None = None, *, root: Path = Path("/")) -> Inventory:
    """Facts of the machine and, inside a cluster, of its Node.

    With `folder` the execution providers are kept there, so that only the first start after an installation
    asks for them. `root` is where the file system begins.
    """
    node, accelerators = node_facts()
    return Inventory(
        architecture=platform.machine(),
        cpus=os.cpu_count() or 0,
        memory_bytes=psutil.virtual_memory().total,
        runtimes=installed(),
        providers=available(folder, root=root),
        accelerators=accelerators or hardware.accelerators(root),
        node=node,
        soc=hardware.soc(root),
        drivers=hardware.drivers(root),
    )


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
