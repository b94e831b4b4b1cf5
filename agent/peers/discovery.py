"""Where peers may be: a list, a DNS name, multicast DNS. Anyone may lie in each of them."""

from __future__ import annotations

import ipaddress
import logging
import secrets
import socket
import threading
from typing import Any, Protocol

from agent.peers.settings import MOST, Address, Settings
from edgeward.clock import Clock
from edgeward.errors import MissingDependency

log = logging.getLogger(__name__)

#: Seconds for which a DNS answer is used.
DNS_SECONDS = 15.0
SERVICE = "_edgeward._tcp.local."


class Source(Protocol):
    def addresses(self) -> list[Address]: ...


class Directory:
    """All sources together: the list first, then DNS, then multicast DNS."""

    def __init__(self, settings: Settings, clock: Clock, mdns: Source | None = None) -> None:
        self._static = list(settings.static[:MOST])
        self._dns = settings.dns
        self._mdns = mdns
        self._clock = clock
        self._lock = threading.Lock()
        self._resolved: list[Address] = []
        self._resolved_at = -DNS_SECONDS

    def addresses(self) -> list[Address]:
        """Each once; may wait for the resolver."""
        found = [*self._static, *self._by_dns(), *(self._mdns.addresses() if self._mdns else [])]
        return list(dict.fromkeys(found))

    def _by_dns(self) -> list[Address]:
        if self._dns is None:
            return []
        with self._lock:
            now = self._clock.monotonic()
            if now - self._resolved_at >= DNS_SECONDS:
                self._resolved_at = now
                try:
                    infos = socket.getaddrinfo(*self._dns, type=socket.SOCK_STREAM)
                    self._resolved = [Address(str(info[4][0]), self._dns.port) for info in infos][:MOST]
                except (OSError, UnicodeError) as error:
                    # The peers that were there may still be: a resolver away is no reason to forget them.
                    log.info("peers by DNS: %s: %s", self._dns, error)
            return self._resolved


class Mdns:
    """DNS-SD over multicast DNS (RFC 6763, RFC 6762): announces this agent's port, and collects others'.

    The announcement's name is random and it holds no text: the network learns that an agent is there, not
    which. Taken are addresses of private networks only, MOST of them.
    """

    def __init__(self, port: int | None, *, addresses: list[str] | None = None, **options: Any) -> None:
        """`port` None announces nothing; `addresses` to announce, by default all; `options` for Zeroconf.

        Raises MissingDependency.
        """
        try:
            import zeroconf
        except ImportError:
            raise MissingDependency(
                "zeroconf is not installed", hint="pip install 'edgeward[agent-mdns]'"
            ) from None
        self._lock = threading.Lock()
        self._found: dict[str, list[Address]] = {}
        self._own = f"{secrets.token_hex(6)}.{SERVICE}"
        self._zeroconf = zeroconf.Zeroconf(**options)
        try:
            if port is not None:
                own = _own_addresses() if addresses is None else addresses
                packed = [ipaddress.ip_address(address).packed for address in own]
                host = f"{self._own.partition('.')[0]}.local."
                self._zeroconf.register_service(
                    zeroconf.ServiceInfo(SERVICE, self._own, port=port, addresses=packed, server=host)
                )
            self._browser = zeroconf.ServiceBrowser(self._zeroconf, SERVICE, handlers=[self._changed])
        except BaseException:
            self._zeroconf.close()
            raise

    def _changed(self, zeroconf: Any, service_type: str, name: str, state_change: Any) -> None:
        if state_change.name == "Removed":
            with self._lock:
                self._found.pop(name, None)
            return
        info = zeroconf.get_service_info(service_type, name)
        if info is not None:
            self._seen(name, info.parsed_scoped_addresses(), info.port)

    def addresses(self) -> list[Address]:
        with self._lock:
            return [address for found in self._found.values() for address in found][:MOST]

    def stop(self) -> None:
        """Take the announcement back."""
        self._zeroconf.close()

    def _seen(self, name: str, hosts: list[str], port: int | None) -> None:
        if name == self._own or port is None or not 0 < port < 65536:
            return
        usable = [Address(host, port) for host in hosts if _is_near(host)][:2]
        with self._lock:
            if usable and (name in self._found or len(self._found) < MOST):
                self._found[name] = usable


def _is_near(host: str) -> bool:
    """A stranger's announcement must not send agents out into the internet."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    # A scope (fe80::1%eth0) has no place in a URL.
    return address.is_private and not address.is_unspecified and "%" not in host


def _own_addresses() -> list[str]:
    import psutil

    found = []
    for addresses in psutil.net_if_addrs().values():
        for item in addresses:
            host = item.address.partition("%")[0]
            if item.family in (socket.AF_INET, socket.AF_INET6) and _is_near(host):
                address = ipaddress.ip_address(host)
                if not address.is_loopback and not address.is_link_local:
                    found.append(host)
    return found[:8]
