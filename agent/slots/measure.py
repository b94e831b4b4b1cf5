"""How fast a variant is on this device, and how much memory it takes. A thin shell; the rules are in selection."""

from __future__ import annotations

import threading
from collections.abc import Callable

import msgspec
import numpy as np

from agent.runtime.engine import Engine
from agent.runtime.port import Runner, Tensor, Timing
from agent.runtime.tensors import to_tensors
from agent.slots.selftest import first_row
from agent.state import Measurement
from edgeward.clock import Clock
from edgeward.errors import EdgewardError
from edgeward.storage import sha256_hex
from edgeward.wire.reports import Inventory
from edgeward.wire.slots import SlotPolicy

#: Seconds for one variant, and how many runs are enough or the least whatever they take.
SECONDS = 2.0
#: How often it is asked whether to go on while one inference takes long.
_LOOK_UP = 0.5
WARM_UP, LEAST_RUNS, MOST_RUNS = 3, 5, 1000


def machine_key(inventory: Inventory) -> str:
    """Identifies the device's kind: chip, accelerators, drivers; not the Node it happens to be."""
    facts = msgspec.structs.replace(inventory, node={}, runtimes={}, memory_bytes=0)
    return sha256_hex(msgspec.json.Encoder(order="deterministic").encode(facts))


def key(blob: str, machine: str, runtime_version: str, policy: SlotPolicy, providers: tuple[str, ...]) -> str:
    """What a measurement depends on: it is taken once for each."""
    facts = [
        blob,
        machine,
        runtime_version,
        policy.threads,
        policy.concurrency,
        policy.gpu_memory_bytes,
        providers,
    ]
    return sha256_hex(msgspec.json.encode(facts))


def trial_policy(policy: SlotPolicy) -> SlotPolicy:
    """As the slot's, but always in a worker, whose memory is its own, and one that may outgrow its ceiling.

    A worker that is replaced for its memory would hide how much it wants.
    """
    return msgspec.structs.replace(policy, isolation="process", memory_bytes=None)


def measure(
    engine: Engine,
    runner: Runner,
    golden: dict[str, np.ndarray],
    memory_limit: int | None,
    clock: Clock,
    going_on: Callable[[], None],
    seconds: float = SECONDS,
) -> Measurement:
    """Run one example again and again for `seconds` at most, after a warm-up.

    `going_on` is called between runs and may raise to stop. Ends early above `memory_limit` bytes: the
    variant is out, and the device needs its memory. Raises what the model's inference raises.
    """
    inputs = to_tensors(first_row(golden, runner.inputs))
    until = clock.monotonic() + seconds
    memory = 0
    times: list[float] = []
    for count in range(WARM_UP + MOST_RUNS):
        going_on()
        elapsed = once(engine, runner, inputs, going_on)
        memory = max(memory, resident_bytes(runner))
        late = clock.monotonic() >= until
        over = memory_limit is not None and memory > memory_limit
        # Of a model that takes seconds, the warm-up counts: better than no figure.
        if count >= WARM_UP or late or over:
            times.append(elapsed)
        if over or (late and _enough(times, seconds)):
            break
    p50, p95 = (float(value) for value in np.percentile(times, (50, 95)))
    return Measurement(runner.provider, p50, p95, memory)


def _enough(times: list[float], seconds: float) -> bool:
    """A model so slow that even a few runs would take several times the time gets fewer."""
    return len(times) >= LEAST_RUNS or sum(times) / 1e3 >= seconds


def resident_bytes(runner: Runner) -> int:
    """Of the runner's worker; 0 for a model in the agent's own process."""
    resident = getattr(runner, "resident_bytes", None)
    return int(resident()) if callable(resident) else 0


def once(engine: Engine, runner: Runner, inputs: list[Tensor], going_on: Callable[[], None]) -> float:
    """Milliseconds of one inference without the hop between threads. Raises RuntimeFault and its kin.

    `going_on` is called while it takes long and may raise: the inference is then left to itself.
    """
    answer: list[tuple[list[Tensor] | EdgewardError, Timing]] = []
    ready = threading.Event()

    def done(result: list[Tensor] | EdgewardError, timing: Timing) -> None:
        answer.append((result, timing))
        ready.set()

    def begin() -> None:
        try:
            runner.submit(inputs, done)
        except EdgewardError as error:
            done(error, Timing(0, 0, 0))

    engine.loop.call_soon_threadsafe(begin)
    while not ready.wait(_LOOK_UP):
        going_on()
    result, timing = answer[0]
    if isinstance(result, EdgewardError):
        raise result
    return timing.infer_ns / 1e6
