"""What the server may serve: the port to the agent's slots."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol

from agent.runtime.port import Runner
from agent.slots.guard import Health
from agent.slots.tap import Tap
from edgeward.wire.package import Runtime, TensorSpec


@dataclass(frozen=True)
class Served:
    """One model version in a slot. `runner` is None while it is not ready; `reason` then says why.

    `score` is the output that the guard watches, if it does; what was answered is offered at the `tap`.
    """

    name: str
    version: str
    runtime: Runtime
    digest: str
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    runner: Runner | None
    reason: str = ""
    max_batch: int = 1
    nan: Literal["reject", "allow"] = "reject"
    health: Health = field(default_factory=Health, compare=False)
    score: str = ""
    tap: Tap = field(default_factory=Tap, compare=False)

    @property
    def ready(self) -> bool:
        return self.runner is not None


class Catalog(Protocol):
    """Asked on each request, on the server's loop: must answer from memory."""

    @property
    def settled(self) -> bool:
        """False while what ran before is still being loaded: a model not found may be one of those."""
        ...

    def find(self, name: str, version: str = "") -> Served | None:
        """The model; without a version, the acting one."""
        ...

    def all(self) -> list[Served]: ...
