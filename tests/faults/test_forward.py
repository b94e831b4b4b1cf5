"""From a site to the cloud, whatever happens in between: each row once, each decision counted once."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from edgeward.broker import EmbeddedBroker
from edgeward.identifiers import DeviceName
from edgeward.wire.resources import Residency
from edgeward.wire.rows import Lost
from simulators.fault_proxy import Faults
from tests.faults.forward_child import PACE, RESIDENCY
from tests.simulators.test_fault_proxy import Running
from tests.trends.forwarding_bench import Central, Fleet, Site, policy, wait_until
from trends.ledger import Ledger, check_chain

ROOT = Path(__file__).parents[2]


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[EmbeddedBroker]:
    with EmbeddedBroker(tmp_path / "broker") as running:
        yield running


def child(role: str, folder: Path, url: str, step: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.faults.forward_child", role, str(folder), url, str(step)],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


class Produced:
    """What the devices sent so far: results with losses, trends and samples."""

    def __init__(self) -> None:
        self.rows = 0

    def more(self, site: Site, count: int = 20) -> None:
        first, self.rows = self.rows, self.rows + count
        site.produce("result", first, count, lost=(Lost(first + 3, first + 4, 1, 2, {"thinned": 2}),))
        site.produce("trend", first, count)
        site.produce("sample", first, count)

    def check(self, site: Site, central: Central) -> None:
        lost = self.rows // 10
        assert central.lanes() == {
            ("turbine-1", "result"): (self.rows - lost, lost, 0, 0),
            ("turbine-1", "trend"): (self.rows // 2, self.rows // 2, 0, 0),
            ("turbine-1", "sample"): (0, self.rows, 0, 0),
        }
        ask = "select seq, outputs from results order by seq"
        assert central.ask(ask) == site.ask(ask)
        assert central.ask("select * from trends where series <> 'output:score'") == []
        site.forward(central.url, RESIDENCY)
        counted = [*site.ledger.decisions(), *site.ledger.tallies()]
        check_chain(site.ledger.decisions())
        site.stop()
        for lane, (forwarded, withheld, before) in {
            "result": (self.rows - lost, 0, lost),
            "trend": (self.rows // 2, self.rows // 2, 0),
            "sample": (0, self.rows, 0),
        }.items():
            mine = [each for each in counted if each.lane == lane]
            assert sum(each.forwarded for each in mine) == forwarded
            assert sum(each.withheld for each in mine) == withheld
            assert sum(each.lost for each in mine) == before


def decided(site: Site) -> int:
    ledger = Ledger(site.folder / "forward.db", 0.0)
    try:
        counted = [*ledger.decisions(), *ledger.tallies()]
        return sum(each.forwarded + each.withheld + each.lost for each in counted)
    finally:
        ledger.close()


def arrived(central: Central) -> int:
    return sum(stored + gaps for stored, gaps, _, _ in central.lanes().values())


def test_a_kill_of_the_site_at_any_step(tmp_path: Path, broker: EmbeddedBroker) -> None:
    fleet, produced = Fleet(tmp_path), Produced()
    site, central = Site(tmp_path / "site", fleet), Central(tmp_path / "central", fleet, broker.url)
    central.start()
    for step in ("decided:1", "sent:1", "sent:2", "sent:3", "acknowledged:1", "recorded:1"):
        produced.more(site)
        if step.startswith("sent"):
            site.tables.flush()
        site.journal.close()
        process = child("site", tmp_path, broker.url, step)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, step
        wait_until(lambda: central.ingester is not None and central.ingester._queue.empty())
        assert decided(site) >= arrived(central), "what has left is in the log already"
        site.open()
        site.ingest._journal = site.journal
    site.forward(broker.url, RESIDENCY, PACE)
    wait_until(lambda: site.behind == 0)
    site.stop()
    produced.check(site, central)
    site.close()
    central.close()


def test_a_kill_of_the_central_store_at_any_step(tmp_path: Path, broker: EmbeddedBroker) -> None:
    fleet, produced = Fleet(tmp_path), Produced()
    site, central = Site(tmp_path / "site", fleet), Central(tmp_path / "central", fleet, broker.url)
    central.journal.close()
    site.forward(broker.url, RESIDENCY, PACE)
    for step in ("before", "not committed", "committed", "acknowledging", "acknowledged"):
        for time in (1, 2):
            process = child("central", tmp_path, broker.url, f"{step}:{time}")
            while process.poll() is None:
                produced.more(site)
                wait_until(lambda process=process: process.poll() is not None or site.behind == 0)
            assert process.returncode == -signal.SIGKILL, step
            process.communicate()
    central.open()
    central.tables.flush()
    central.start()
    wait_until(lambda: site.behind == 0)
    site.stop()
    produced.check(site, central)
    site.close()
    central.close()


def test_packets_lost_doubled_and_overtaken(
    tmp_path: Path, broker: EmbeddedBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trends.outgoing.MAX_ROWS", 20)
    monkeypatch.setattr("trends.forwarder.MAX_ROWS", 20)
    fleet = Fleet()
    site = Site(tmp_path / "site", fleet)
    devices = [DeviceName("north", f"d{number}") for number in range(4)]
    for device in devices:
        for first in range(0, 200, 100):
            site.produce("result", first, 100, device)
    site.tables.flush()
    faults = Faults(lost=0.1, doubled=0.1, reordered=0.1)
    with Running(broker.port, faults) as link:
        link.proxy._chance = random.Random(1)
        central = Central(tmp_path / "central", fleet, link.url)
        central.start()
        forwarder = site.forward(link.url, RESIDENCY, replace(PACE, patience=0.2))
        wait_until(lambda: site.behind == 0, 300.0)
        assert min(link.proxy.counts[name] for name in ("lost", "doubled", "reordered")) >= 3
        assert forwarder.counts["batches"] > 40
        site.stop()
        central.stop()
    assert central.lanes() == {(device.device, "result"): (200, 0, 0, 0) for device in devices}
    site.close()
    central.close()


def test_no_copy_that_a_later_policy_forbids_waits_for_the_next_connection(
    tmp_path: Path, broker: EmbeddedBroker
) -> None:
    fleet = Fleet()
    site, central = Site(tmp_path / "site", fleet), Central(tmp_path / "central", fleet, broker.url)
    central.start()
    with Running(broker.port, Faults(lost=1.0)) as link:
        forwarder = site.forward(link.url, RESIDENCY, replace(PACE, patience=1e9))
        site.produce("result", 0, 20)
        wait_until(lambda: link.proxy.counts["lost"])
        forwarder.policy = policy(north=Residency(forward=[]))
        link.proxy.faults = Faults()
        link.loop.call_soon_threadsafe(link.proxy.cut_all)
        wait_until(lambda: site.behind == 0)
        site.close()
    assert central.lanes() == {("turbine-1", "result"): (0, 20, 0, 0)}
    central.close()


def test_a_broker_that_is_killed_again_and_again(tmp_path: Path) -> None:
    fleet, produced = Fleet(), Produced()
    site = Site(tmp_path / "site", fleet)
    broker = EmbeddedBroker(tmp_path / "broker")
    broker.start()
    central = Central(tmp_path / "central", fleet, broker.url)
    central.start()
    forwarder = site.forward(broker.url, RESIDENCY, PACE)
    for _ in range(5):
        produced.more(site)
        batches = forwarder.counts["batches"]
        wait_until(lambda batches=batches: forwarder.counts["batches"] > batches)
        broker.kill()
        broker.start()
        wait_until(lambda: forwarder.connected and central.ingester.connected)
    wait_until(lambda: site.behind == 0)
    site.stop()
    produced.check(site, central)
    site.close()
    central.close()
    broker.stop()
