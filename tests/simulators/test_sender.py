"""The sensor's state machine: nothing skipped, nothing beyond the window, always a way forward."""

from hypothesis import given
from hypothesis import strategies as st

from simulators import sender
from simulators.sender import RESEND_AFTER, Range, SenderState


def drive(state, now, *, released=1000, batch=4, window=8):
    sent = []
    while True:
        state, chosen = sender.send(state, now, released=released, batch=batch, window=window)
        if chosen is None:
            return state, sent
        sent.append(chosen)


def test_fills_the_window_and_waits():
    state, sent = drive(SenderState(total=100), 0.0)
    assert sent == [Range(0, 3), Range(4, 7)]
    state = sender.acknowledge(state, 2, 0.1)
    assert drive(state, 0.1)[1] == [Range(8, 10)]


def test_sends_only_what_the_event_clock_has_released():
    state, sent = drive(SenderState(total=100), 0.0, released=3)
    assert sent == [Range(0, 2)]
    assert drive(state, 0.1, released=5)[1] == [Range(3, 4)]


def test_repeats_from_the_first_unacknowledged_after_a_second():
    state, _ = drive(SenderState(total=100), 5.0)
    state = sender.acknowledge(state, 4, 5.5)
    state, sent = drive(state, 5.6)
    assert sent[0].first == 8
    assert drive(state, 5.5 + RESEND_AFTER - 0.01)[1] == []
    assert drive(state, 5.5 + RESEND_AFTER)[1][0].first == 5


def test_a_slow_sensor_repeats_too():
    """New samples must not keep pushing the time-out away."""
    state = SenderState(total=1000)
    now, repeated = 0.0, False
    for released in range(1, 60):
        state, sent = drive(state, now, released=released, window=500)
        repeated = repeated or any(chosen.first == 0 for chosen in sent[:1] if released > 1)
        now += 0.1
    assert repeated


def test_an_ack_for_what_was_never_sent_is_ignored():
    state, _ = drive(SenderState(total=100), 0.0)
    assert sender.acknowledge(state, 99, 0.1) == state
    assert sender.acknowledge(state, -1, 0.1) == state


@given(
    total=st.integers(1, 80),
    batch=st.integers(1, 9),
    window=st.integers(1, 20),
    events=st.lists(
        st.tuples(
            st.sampled_from(["deliver", "lose", "ack", "lose ack", "reconnect", "forge"]), st.integers(0, 90)
        ),
        max_size=120,
    ),
)
def test_any_network_delivers_everything_in_order_once_it_calms_down(total, batch, window, events):
    """A receiver that takes only the next expected number ends with all of them, whatever is lost."""
    state, now, expected = SenderState(total=total), 0.0, 0
    wire: list[Range] = []

    def step():
        nonlocal state
        state, chosen = sender.send(state, now, released=total, batch=batch, window=window)
        if chosen is not None:
            assert 0 <= chosen.first <= chosen.last < total
            assert chosen.last - state.acked <= window
            assert chosen.first <= state.sent + 1
            wire.append(chosen)

    def receive(chosen):
        nonlocal expected
        if chosen.first <= expected <= chosen.last:
            expected = chosen.last + 1

    for kind, number in events:
        now += 0.05
        step()
        before = state.acked
        if kind == "deliver" and wire:
            receive(wire.pop(number % len(wire)))
        elif kind == "lose" and wire:
            wire.pop(number % len(wire))
        elif kind == "ack":
            state = sender.acknowledge(state, expected - 1, now)
        elif kind == "reconnect":
            wire.clear()
            state = sender.rewind(state, now)
        elif kind == "forge":
            state = sender.acknowledge(state, state.sent + 1 + number, now)
        assert before <= state.acked < expected or state.acked == -1

    for _ in range(40 * total + 400):
        if state.done:
            break
        now += 0.2
        step()
        while wire:
            receive(wire.pop(0))
        state = sender.acknowledge(state, expected - 1, now)
    assert state.done
    assert expected == total
