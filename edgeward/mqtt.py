"""One MQTT v5 connection (paho-mqtt) that comes back by itself; the only module that imports paho."""

from __future__ import annotations

import contextlib
import logging
import random
import socket
import ssl
import urllib.parse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paho.mqtt.client import Client, ConnectFlags, DisconnectFlags, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from edgeward.clock import SystemClock
from edgeward.errors import InvalidDocument, Unavailable
from edgeward.trust.tls import PeerTime, client_context

log = logging.getLogger(__name__)

#: Seconds after which a broker that answers none of what it was given gets a new connection.
STALL_S = 60.0


@dataclass(frozen=True)
class Broker:
    """Where the broker is. `url` is `mqtt://host[:port]` or `mqtts://host[:port]`; files are PEM."""

    url: str
    ca_file: Path | None = None
    certificate_file: Path | None = None
    key_file: Path | None = None
    peer_time: PeerTime | None = None

    def endpoint(self) -> tuple[str, int, bool]:
        """Host, port and whether to use TLS. Raises InvalidDocument."""
        parts = urllib.parse.urlsplit(self.url)
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme not in ("mqtt", "mqtts") or not parts.hostname or port == -1:
            raise InvalidDocument(
                f"{self.url!r} is not a broker address", hint="expected mqtt://host:1883 or mqtts://host:8883"
            )
        tls = parts.scheme == "mqtts"
        return parts.hostname, port or (8883 if tls else 1883), tls

    def context(self) -> ssl.SSLContext:
        """Which brokers to trust: those of `ca_file`, by default those of the system's CAs."""
        if self.peer_time is not None:
            return client_context(self.peer_time, ca_file=self.ca_file)
        return ssl.create_default_context(cafile=str(self.ca_file) if self.ca_file else None)


@dataclass(frozen=True)
class Message:
    """A received message. With `manual_ack`, `acknowledge` must be called once it is safely handled."""

    topic: str
    payload: bytes
    retained: bool
    acknowledge: Callable[[], None]


@dataclass(frozen=True)
class Will:
    topic: str
    payload: bytes
    retain: bool = True


def _send_at_once(client: Client, userdata: Any, opened: Any) -> None:
    """Nagle's algorithm would hold a small message back until the broker's delayed ack: 40 ms a hop."""
    if isinstance(opened, socket.socket) and opened.family in (socket.AF_INET, socket.AF_INET6):
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _acknowledge_at_once(client: Client) -> None:
    """The other half: a broker with Nagle's algorithm holds its next message back until our TCP ack.

    The kernel would delay that by 40 ms when we have nothing to send. Linux forgets the option, so it is
    set again for each packet.
    """
    opened = client.socket()
    quick = getattr(socket, "TCP_QUICKACK", None)
    if quick is not None and isinstance(opened, socket.socket):
        with contextlib.suppress(OSError):
            opened.setsockopt(socket.IPPROTO_TCP, quick, 1)


class Link:
    """Connects in the background, subscribes again after each reconnect, and calls back from its own thread.

    `on_connect` runs after every (re)connect, when the subscriptions have been requested: the place
    to publish retained state again, since a broker that was killed may have forgotten it.
    A `will` that is a function is asked before each connection. `on_acknowledged` gets the number of each
    message sent by `send` or of each `barrier`, and why the broker refused it, empty when it took it.
    """

    def __init__(
        self,
        broker: Broker,
        client_id: str,
        *,
        subscriptions: tuple[str, ...] = (),
        on_message: Callable[[Message], None] | None = None,
        on_connect: Callable[[], None] | None = None,
        on_disconnect: Callable[[], None] | None = None,
        on_acknowledged: Callable[[int, str], None] | None = None,
        will: Will | Callable[[], Will] | None = None,
        manual_ack: bool = False,
        max_reconnect_delay: float = 30.0,
        receive_maximum: int = 100,
    ) -> None:
        self._broker = broker
        self._subscriptions = subscriptions
        self._on_message = on_message
        self._on_connect = on_connect
        self._on_disconnect = on_disconnect
        self._on_acknowledged = on_acknowledged
        self._manual_ack = manual_ack
        self._client = Client(
            CallbackAPIVersion.VERSION2,
            client_id=client_id,
            protocol=MQTTProtocolVersion.MQTTv5,
            manual_ack=manual_ack,
        )
        self._max_reconnect_delay = max(1.0, max_reconnect_delay)
        self._spread_reconnects()
        self._client.max_queued_messages_set(10_000)
        self._connect_properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]  # paho leaves it untyped
        self._connect_properties.ReceiveMaximum = receive_maximum
        self._will = will
        self._client.on_connect = self._connected
        self._client.on_disconnect = self._disconnected
        self._client.on_message = self._received
        self._client.on_socket_open = self._about_to_connect
        self._client.on_publish = self._published
        self._client.on_subscribe = self._subscribed
        self._clock = SystemClock()
        self._given = self._answered = 0
        self._heard = 0.0

    @property
    def connected(self) -> bool:
        return self._client.is_connected()

    def _spread_reconnects(self) -> None:
        """A fleet that lost its broker at one instant must not come back at one instant.

        Paho doubles its delay from the lowest to the highest: both are this client's own.
        """
        lowest, highest = random.uniform(0.25, 1.75), self._max_reconnect_delay * random.uniform(0.5, 1.0)  # noqa: S311
        self._client.reconnect_delay_set(min_delay=lowest, max_delay=max(lowest, highest))  # type: ignore[arg-type]  # paho adds it to a time, a float

    def start(self) -> None:
        """Begin to connect; returns at once. Raises InvalidDocument for an impossible address."""
        host, port, tls = self._broker.endpoint()
        if tls:
            context = self._broker.context()
            if self._broker.certificate_file and self._broker.key_file:
                context.load_cert_chain(self._broker.certificate_file, self._broker.key_file)
            self._client.tls_set_context(context)
        self._client.connect_async(
            host, port, keepalive=30, clean_start=True, properties=self._connect_properties
        )
        self._client.loop_start()

    def stop(self) -> None:
        """Disconnect cleanly (no will) and end the network thread."""
        self._client.disconnect()
        self._client.loop_stop()

    def publish(self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False) -> bool:
        """Hand a message to the network thread; True when it was accepted for sending.

        That is no promise of delivery: durability comes from acks of the other end.
        """
        if qos:
            self._renew_if_stalled()
            self._given += 1  # first: the answer may be quicker than this thread
        info = self._client.publish(topic, payload, qos=qos, retain=retain)
        if qos and info.rc not in (MQTTErrorCode.MQTT_ERR_SUCCESS, MQTTErrorCode.MQTT_ERR_NO_CONN):
            self._given -= 1
        return info.rc == MQTTErrorCode.MQTT_ERR_SUCCESS

    def send(
        self,
        topic: str,
        payload: bytes,
        *,
        content_type: str = "",
        user_properties: Sequence[tuple[str, str]] = (),
    ) -> int:
        """Hand a message of QoS 1 to the network thread; its number, for `on_acknowledged`.

        It waits for a connection, and is sent again after a lost one, until the broker has answered.
        Raises Unavailable when too many wait.
        """
        properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]  # paho leaves it untyped
        if content_type:
            properties.ContentType = content_type
        if user_properties:
            properties.UserProperty = list(user_properties)
        self._renew_if_stalled()
        self._given += 1  # first: the answer may be quicker than this thread
        sent = self._client.publish(topic, payload, qos=1, properties=properties)
        if sent.rc == MQTTErrorCode.MQTT_ERR_QUEUE_SIZE:
            self._given -= 1
            raise Unavailable(f"more messages wait for broker {self._broker.url} than may")
        return sent.mid

    def barrier(self) -> int | None:
        """Ask for an answer that comes after the broker has read all that was published before, QoS 0 too.

        The number that `on_acknowledged` gets then; None without a connection. It is a subscription that
        is there already: MQTT has no other request that a broker answers in turn. After a disconnect no
        answer comes.
        """
        options = SubscribeOptions(qos=1, retainHandling=SubscribeOptions.RETAIN_DO_NOT_SEND)
        code, number = self._client.subscribe([(topic, options) for topic in self._subscriptions])
        return number if code == MQTTErrorCode.MQTT_ERR_SUCCESS else None

    def renew(self) -> None:
        """End this connection and make a new one, as after a cut.

        What a broken gateway or broker has swallowed is repeated on no connection (MQTT 5.0, 4.4) and takes its
        place in the window of either side for ever: when all places are taken, both ends wait.
        """
        opened = self._client.socket()
        if isinstance(opened, socket.socket):
            with contextlib.suppress(OSError):
                opened.shutdown(socket.SHUT_RDWR)

    def _renew_if_stalled(self) -> None:
        now = self._clock.monotonic()
        if self._given <= self._answered:
            self._heard = now
        elif now - self._heard > STALL_S and self.connected:
            log.warning("broker %s answers nothing that it was given: connecting anew", self._broker.url)
            self._heard = now
            self.renew()

    def subscribe(self, *topics: str) -> None:
        """Add subscriptions, now and after each reconnect."""
        self._subscriptions = tuple(dict.fromkeys(self._subscriptions + topics))
        if self.connected:
            self._request(topics)

    def unsubscribe(self, *topics: str) -> None:
        self._subscriptions = tuple(topic for topic in self._subscriptions if topic not in topics)
        if self.connected and topics:
            self._client.unsubscribe(list(topics))

    def _request(self, topics: tuple[str, ...]) -> None:
        if topics:
            self._client.subscribe([(topic, SubscribeOptions(qos=1)) for topic in topics])

    def _about_to_connect(self, client: Client, userdata: Any, opened: Any) -> None:
        """The socket is open and the CONNECT packet comes next."""
        _send_at_once(client, userdata, opened)
        if self._will is not None:
            self._guarded(self._set_will)

    def _set_will(self) -> None:
        will = self._will() if callable(self._will) else self._will
        if will is not None:
            self._client.will_set(will.topic, will.payload, qos=1, retain=will.retain)

    def _subscribed(
        self,
        client: Client,
        userdata: Any,
        mid: int,
        reasons: list[ReasonCode],
        properties: Properties | None,
    ) -> None:
        self._acknowledged(mid, next((str(reason) for reason in reasons if reason.is_failure), ""))

    def _acknowledged(self, mid: int, problem: str) -> None:
        if self._on_acknowledged is not None:
            handler = self._on_acknowledged
            self._guarded(lambda: handler(mid, problem))

    def _connected(
        self,
        client: Client,
        userdata: Any,
        flags: ConnectFlags,
        reason: ReasonCode,
        properties: Properties | None,
    ) -> None:
        if reason.is_failure:
            log.warning("broker %s refused the connection: %s", self._broker.url, reason)
            return
        log.info("connected to broker %s", self._broker.url)
        self._heard = self._clock.monotonic()
        self._request(self._subscriptions)
        if self._on_connect is not None:
            self._guarded(self._on_connect)

    def _disconnected(
        self,
        client: Client,
        userdata: Any,
        flags: DisconnectFlags,
        reason: ReasonCode,
        properties: Properties | None,
    ) -> None:
        log.info("disconnected from broker %s: %s", self._broker.url, reason)
        self._spread_reconnects()
        if self._on_disconnect is not None:
            self._guarded(self._on_disconnect)

    def _published(
        self,
        client: Client,
        userdata: Any,
        mid: int,
        reason: ReasonCode,
        properties: Properties | None,
    ) -> None:
        self._answered += 1
        self._heard = self._clock.monotonic()
        _acknowledge_at_once(client)
        self._acknowledged(mid, str(reason) if reason.is_failure else "")

    def _received(self, client: Client, userdata: Any, message: MQTTMessage) -> None:
        mid, qos = message.mid, message.qos
        _acknowledge_at_once(client)

        def acknowledge() -> None:
            if self._manual_ack:
                client.ack(mid, qos)

        if self._on_message is not None:
            received = Message(message.topic, bytes(message.payload), message.retain, acknowledge)
            handler = self._on_message
            self._guarded(lambda: handler(received))

    def _guarded(self, callback: Callable[[], None]) -> None:
        """A bug in a handler must not end paho's thread: it would look like a silent network."""
        try:
            callback()
        except Exception:
            log.exception("an MQTT handler failed")
