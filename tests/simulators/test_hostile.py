"""The hostile client's forgeries have the right shape, and the envelope refuses every one."""

import threading
import time

import pytest

from edgeward.broker import EmbeddedBroker
from edgeward.clock import SystemClock
from edgeward.errors import TrustError
from edgeward.identifiers import DeviceName
from edgeward.mqtt import Broker, Link
from edgeward.trust import dsse
from edgeward.trust.certificates import DeviceIdentity, TrustAnchor, issue, make_ca, to_der, to_pem
from edgeward.trust.keys import SigningIdentity, generate_key, public_pem
from edgeward.wire import topics
from edgeward.wire.desired import PAYLOAD_TYPE, DesiredState
from edgeward.wire.envelope import open_envelope, seal
from edgeward.wire.reports import Status
from edgeward.wire.rows import Batch
from simulators.demo.hostile import HostileClient

NAMES = [DeviceName("north", "turbine-1"), DeviceName("south", "turbine-2")]
KINDS = {
    "forged rows",
    "rows under a stolen certificate",
    "forged acks",
    "forged desired state",
    "forged reports",
    "forged wills",
    "replayed messages",
    "messages moved to another device",
    "messages moved to another lane",
}


def test_all_attacks_are_made_and_none_opens(tmp_path):
    now = SystemClock().now()
    ca_key, key = generate_key(), generate_key()
    ca = make_ca(ca_key, now)
    der = to_der(issue(ca, ca_key, key.public_key(), DeviceIdentity(NAMES[0]), now, lifetime=3600))
    genuine = SigningIdentity(key, der)
    heard, lock = [], threading.Lock()

    def hear(message):
        with lock:
            heard.append(message)

    with EmbeddedBroker(tmp_path) as broker:
        link = Link(Broker(broker.url), "witness", subscriptions=(f"{topics.PREFIX}/#",), on_message=hear)
        link.start()
        hostile = HostileClient(broker.url, NAMES)
        hostile.start()
        own = set()
        try:
            deadline = time.monotonic() + 60
            while set(hostile.sent) != KINDS or len(heard) - len(own) < 40:
                assert time.monotonic() < deadline, (set(hostile.sent), len(heard))
                if link.connected:
                    birth = seal(
                        Status(boot=1, n=1, at=now, state="online"),
                        topics.status(NAMES[0]),
                        genuine,
                        with_certificate=True,
                    )
                    batch = seal(Batch("e", 0, 1, 0, b""), topics.up(NAMES[0], "result"), genuine)
                    own |= {(topics.status(NAMES[0]), birth), (topics.up(NAMES[0], "result"), batch)}
                    link.publish(topics.status(NAMES[0]), birth)
                    link.publish(topics.up(NAMES[0], "result"), batch)
                time.sleep(0.1)
        finally:
            hostile.stop()
            link.stop()
    anchor = TrustAnchor(to_pem(ca))
    controller = public_pem(generate_key().public_key())
    forged = [message for message in heard if (message.topic, message.payload) not in own]
    assert len(forged) > 10
    for message in forged:
        if message.topic.endswith("/desired"):
            with pytest.raises(TrustError):
                dsse.verify(message.payload, PAYLOAD_TYPE, [controller], DesiredState)
        else:
            with pytest.raises(TrustError):
                open_envelope(message.payload, message.topic, anchor, now, find_certificate=lambda _: der)
