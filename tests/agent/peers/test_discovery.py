"""Where peers may be: each source, what it leaves out, and that none is believed."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from agent.peers.discovery import DNS_SECONDS, SERVICE, Directory, Mdns
from agent.peers.settings import MOST, Address, Settings
from edgeward.clock import ManualClock


class Found:
    def __init__(self, *addresses: Address) -> None:
        self._addresses = list(addresses)

    def addresses(self) -> list[Address]:
        return self._addresses


def test_each_place_is_told_once_and_a_list_has_an_end() -> None:
    many = tuple(Address("10.0.0.1", port) for port in range(1, 1000))
    a, b = Address("10.0.0.1", 1), Address("10.0.0.2", 1)
    assert Directory(Settings(static=(a, b, a)), ManualClock(), Found(b)).addresses() == [a, b]
    assert Directory(Settings(static=many), ManualClock()).addresses() == list(many[:MOST])


def test_a_names_addresses_are_asked_for_anew_now_and_then_and_outlive_a_failure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, answers = ManualClock(), [["10.0.0.1", "10.0.0.2"], None, [f"10.1.0.{n}" for n in range(1, 100)]]

    def resolve(host: str, port: int, **_: Any) -> list[Any]:
        assert (host, port) == ("peers.svc", 8472)
        found = answers.pop(0)
        if found is None:
            raise socket.gaierror("no answer")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, port)) for host in found]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    directory = Directory(Settings(dns=Address("peers.svc", 8472)), clock)
    first = [Address("10.0.0.1", 8472), Address("10.0.0.2", 8472)]
    for _ in range(2):
        assert directory.addresses() == first
    clock.advance(DNS_SECONDS)
    assert directory.addresses() == first and len(answers) == 1
    clock.advance(DNS_SECONDS)
    assert len(directory.addresses()) == MOST and answers == []


def test_a_name_that_the_resolver_here_knows() -> None:
    directory = Directory(Settings(dns=Address("localhost", 8472)), ManualClock())
    assert Address("127.0.0.1", 8472) in directory.addresses()


@pytest.fixture
def on_loopback() -> Any:
    """Make multicast DNS instances on loopback; skips where a datagram does not come back."""
    pytest.importorskip("zeroconf")
    made: list[Mdns] = []

    def make(port: int | None, **more: Any) -> Mdns:
        try:
            made.append(Mdns(port, addresses=["127.0.0.1"], interfaces=["127.0.0.1"], **more))
        except OSError as error:
            pytest.skip(f"no multicast on loopback here: {error}")
        return made[-1]

    yield make
    for one in made:
        one.stop()


def test_two_agents_find_each_other_by_multicast(on_loopback: Any, until: Any) -> None:
    a, b, only_looking = on_loopback(4001), on_loopback(4002), on_loopback(None)
    until(lambda: len(only_looking.addresses()) == 2)
    until(lambda: a.addresses() and b.addresses())
    assert a.addresses() == [Address("127.0.0.1", 4002)], "not itself"
    assert b.addresses() == [Address("127.0.0.1", 4001)]
    assert set(only_looking.addresses()) == {Address("127.0.0.1", port) for port in (4001, 4002)}
    info = only_looking._zeroconf.get_service_info(SERVICE, a._own)
    assert info.properties == {} and "4001" not in a._own
    a.stop()
    until(lambda: only_looking.addresses() == [Address("127.0.0.1", 4002)])


def test_announcements_of_strange_places_are_left_out(on_loopback: Any) -> None:
    mdns = on_loopback(None)
    for host in ("8.8.8.8", "0.0.0.0", "not-a-number", "fe80::1%eth0", "2001:4860:4860::8888"):
        mdns._seen("one", [host], 80)
    for port in (None, 0, 65536):
        mdns._seen("one", ["10.0.0.1"], port)
    mdns._seen(mdns._own, ["10.0.0.1"], 80)
    assert mdns.addresses() == []
    for number in range(1000):
        mdns._seen(f"n{number}", ["10.0.0.1", "10.0.0.2", "10.0.0.3"], number + 1)
    assert len(mdns.addresses()) == MOST and len(mdns._found) == MOST
