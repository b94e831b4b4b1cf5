"""`edgeward simulate ...`."""

from __future__ import annotations

import logging
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from edgeward.errors import MissingDependency, UsageError


def register(app: typer.Typer) -> None:
    """Add this package's commands to `app`."""
    simulate = typer.Typer(help="Stand in for a plant: sensors, and the whole demo.", no_args_is_help=True)
    simulate.command(name="sensors")(sensors)
    simulate.command(name="link")(link)
    simulate.command(name="demo")(demo)
    app.add_typer(simulate, name="simulate")


def sensors(
    data: Annotated[Path, typer.Option("--data", help="CSV file; a column `label` is never sent.")],
    broker: Annotated[str, typer.Option("--broker", help="mqtt://host:port")],
    topic: Annotated[str, typer.Option("--topic", help="The topic that the stream's source names.")],
    rate: Annotated[float, typer.Option("--rate", min=0.001, help="Rows per second of real time.")],
    batch: Annotated[int, typer.Option("--batch", min=1, max=1000, help="Rows per message at most.")] = 16,
    speed: Annotated[
        float, typer.Option("--speed", min=0.001, help="Event clock: times faster than real time.")
    ] = 1.0,
    window: Annotated[
        int, typer.Option("--window", min=1, help="Rows that may wait for the agent's ack.")
    ] = 512,
    produced: Annotated[
        Path | None, typer.Option("--produced", help="Append here, as JSON lines, what was produced.")
    ] = None,
    device: Annotated[str, typer.Option("--device", help="The device that reads it (for --produced).")] = "",
    stream: Annotated[str, typer.Option("--stream", help="The stream that reads it (for --produced).")] = "",
    rows: Annotated[str, typer.Option("--rows", help="a:b, row numbers, or shares as 0.7:1.0.")] = ":",
    plain: Annotated[
        bool, typer.Option("--plain", help="Send once, without numbers: for a stream without `sequence`.")
    ] = False,
) -> None:
    """Replay a CSV file as a live sensor until the agent has every row durably.

    Example: `edgeward simulate sensors --data held-out.csv --broker mqtt://127.0.0.1:1883
    --topic plant/north/turbine-1 --rate 100`
    """
    from edgeward.mqtt import Broker
    from simulators.sensors import Progress, Replay, Sensor, read_samples

    if any(sign in topic for sign in "+#"):
        raise UsageError("a topic to publish on has no + or #", hint="e.g. plant/north/turbine-1")
    if produced is not None and (plain or not device or not stream):
        raise UsageError("--produced needs --device and --stream, and a sensor that is not --plain")
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(asctime)s %(message)s")
    replay = Replay(topic, device, stream, rate=rate, speed=speed, batch=batch, window=window, plain=plain)
    sensor = Sensor(Broker(broker), replay, read_samples(data, rows), produced=produced)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sensor.stop())
    name = device or topic

    def report(now: Progress) -> None:
        said = f"sent {now.sent}/{now.total}" if plain else now
        print(f"{name}: {said}", file=sys.stderr, flush=True)

    progress = sensor.run(report=report)
    if plain:
        print(f"{name}: all {progress.total} rows are sent", flush=True)
    else:
        print(f"{name}: all {progress.total} rows are durable, {progress.repeats} repeats", flush=True)


def link(
    broker: Annotated[str, typer.Option("--broker", help="mqtt://host:port of the real one, without TLS.")],
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Listen here; 0: a free one.")] = 0,
    lost: Annotated[float, typer.Option("--lost", min=0, max=1, help="Share of packets lost.")] = 0.1,
    doubled: Annotated[float, typer.Option("--doubled", min=0, max=1, help="Share that comes twice.")] = 0.1,
    reordered: Annotated[
        float, typer.Option("--reordered", min=0, max=1, help="Share that later ones overtake.")
    ] = 0.1,
    cut: Annotated[
        float, typer.Option("--cut", min=0, max=1, help="Chance per packet that the connection ends.")
    ] = 0.0,
    seed: Annotated[int, typer.Option("--seed", help="The same faults again.")] = 0,
) -> None:
    """Stand between clients and a broker as a bad link, until Ctrl-C.

    Example: `edgeward simulate link --broker mqtt://127.0.0.1:1883 --port 1884 --lost 0.1`
    """
    import asyncio
    from urllib.parse import urlsplit

    from simulators.fault_proxy import FaultProxy, Faults, serve

    address = urlsplit(broker)
    if address.scheme != "mqtt" or not address.hostname:
        raise UsageError(f"{broker!r} is no broker to stand before", hint="expected mqtt://host:port")
    faults = Faults(lost, doubled, reordered, cut)
    proxy = FaultProxy(address.hostname, address.port or 1883, faults, seed=seed)

    async def run() -> None:
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        await serve(proxy, port, lambda at: print(f"mqtt://127.0.0.1:{at}", flush=True), stop)

    asyncio.run(run())
    print(", ".join(f"{name}: {number}" for name, number in sorted(proxy.counts.items())), flush=True)


def demo(
    folder: Annotated[Path, typer.Option("--dir", help="Folder for everything it makes; replaced.")] = Path(
        ".edgeward/demo"
    ),
    summary: Annotated[Path | None, typer.Option("--summary", help="Write the summary here as JSON.")] = None,
    serve: Annotated[
        bool, typer.Option("--serve", help="Leave all running afterwards, until Ctrl-C.")
    ] = False,
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="The controller's port; 0: a free one.")
    ] = 0,
    configs: Annotated[
        Path | None, typer.Option("--configs", help="Folder with demo/ and demo-rollouts/.")
    ] = None,
) -> None:
    """Run the main job end to end with real parts and real data, faults included.

    Example: `edgeward simulate demo --dir /tmp/edgeward-demo --summary summary.json`
    """
    try:
        from simulators.demo.run import run
    except ImportError as error:
        raise MissingDependency(
            f"{error.name} is not installed", hint="pip install 'edgeward[demo]'"
        ) from None
    if not run(folder, summary=summary, serve=serve, port=port, configs=configs):
        raise typer.Exit(1)
