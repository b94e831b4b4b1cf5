"""Windows on the wall clock, against a reference that looks at every minute."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edgeward.documents import load_yaml
from edgeward.errors import InvalidDocument
from edgeward.wire.resources import parse_resource
from edgeward.wire.schedule import DAYS, Delivery, Hours, Schedule, UnknownZone, Window

MINUTE, DAY = 60, 86400

#: Where the wall clock jumps, and by how much: an hour, half an hour, at midnight, a whole day.
CHANGES = {
    "Europe/Berlin": ["2026-03-29", "2026-10-25"],
    "America/New_York": ["2026-03-08", "2026-11-01"],
    "Australia/Lord_Howe": ["2026-04-05", "2026-10-04"],
    "America/Sao_Paulo": ["2018-11-04", "2019-02-17"],
    "Pacific/Apia": ["2011-12-30"],
    "Europe/Dublin": ["2026-10-25"],
    "Asia/Kathmandu": ["2026-06-01"],
    "UTC": ["2026-06-01"],
}
PLACES = [(zone, day) for zone, days in CHANGES.items() for day in days]


def at(text: str, zone: str = "Europe/Berlin") -> float:
    return datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone)).timestamp()


def window(begin: str, end: str, *days: str) -> Window:
    return msgspec.convert({"from": begin, "to": end, "days": list(days or DAYS)}, Window)


def slow(schedule: Schedule, begin: int, minutes: int) -> list[bool]:
    """Whether it is open at each of `minutes` minutes from `begin` on, by watching the clock on the wall.

    It watches from four days earlier on: a window opens with the first minute that shows its day and `from`, or
    more, and closes with the first that shows its `to`, or more.
    """
    zone = UTC if schedule.zone == "UTC" else ZoneInfo(schedule.zone)
    early = 4 * DAY // MINUTE
    shown = [
        datetime.fromtimestamp(begin + (index - early) * MINUTE, zone).replace(tzinfo=None, fold=0)
        for index in range(early + minutes)
    ]
    seen = [False] * len(shown)
    first, last = min(shown).date(), max(shown).date()
    for one in schedule.windows:
        # A fold shows a time again that is over: what has closed stays closed.
        for offset in range((last - first).days + 1):
            midnight = datetime.combine(first + timedelta(days=offset), datetime.min.time())
            if DAYS[midnight.weekday()] not in one.days:
                continue
            opens, closes = (
                midnight + timedelta(hours=int(text[:2]), minutes=int(text[3:]))
                for text in (one.from_, one.to)
            )
            closes += timedelta(days=closes <= opens)
            index = next((i for i, wall in enumerate(shown) if wall >= opens), len(shown))
            while index < len(shown) and shown[index] < closes:
                seen[index] = True
                index += 1
    return seen[early:]


times = st.builds("{:02}:{:02}".format, st.integers(0, 23), st.integers(0, 59))
near_changes = st.builds("{:02}:{:02}".format, st.integers(0, 4), st.sampled_from([0, 15, 30, 45]))
windows = st.lists(
    st.builds(
        lambda begin, end, days: window(begin, end, *days),
        times | near_changes,
        times | near_changes | st.just("24:00"),
        st.lists(st.sampled_from(DAYS), min_size=1, max_size=7, unique=True),
    ),
    min_size=1,
    max_size=3,
)


@settings(max_examples=20, deadline=None)
@given(place=st.sampled_from(PLACES), windows=windows)
@example(place=("Europe/Berlin", "2026-03-29"), windows=[window("02:15", "02:45")])  # skipped as a whole
@example(place=("Europe/Berlin", "2026-03-29"), windows=[window("02:30", "03:15")])
@example(place=("Europe/Berlin", "2026-10-25"), windows=[window("02:30", "02:45")])  # shown twice
@example(place=("Europe/Berlin", "2026-10-25"), windows=[window("01:30", "02:15")])
@example(place=("Pacific/Apia", "2011-12-30"), windows=[window("22:00", "04:00")])
def test_it_is_open_when_the_clock_on_the_wall_says_so(place: tuple[str, str], windows: list[Window]) -> None:
    zone, day = place
    schedule = Schedule(windows=windows, zone=zone)
    hours = Hours(schedule)
    begin = int(at(day, "UTC")) - 30 * 60 * MINUTE
    seen = slow(schedule, begin, 4 * DAY // MINUTE)
    for index in range(0, len(seen) - 2 * DAY // MINUTE, 5):
        now = float(begin + index * MINUTE)
        assert hours.is_open(now) == seen[index], datetime.fromtimestamp(now, UTC)
        rest = seen[index:]
        if seen[index]:
            closes = hours.closes_at(now)
            if False in rest:
                assert closes == now + rest.index(False) * MINUTE
            else:
                assert closes is None or closes >= now + len(rest) * MINUTE
        else:
            assert hours.closes_at(now) is None
            opens = hours.next_opening(now)
            assert opens is not None, "a weekly window opens again"
            if True in rest:
                assert opens == now + rest.index(True) * MINUTE
            else:
                assert opens >= now + len(rest) * MINUTE


def test_an_opening_that_the_clocks_skip_is_made_up_for_a_week_later() -> None:
    hours = Hours(Schedule(windows=[window("02:15", "02:45", "sun")], zone="Europe/Berlin"))
    assert hours.next_opening(at("2026-03-23T00:00")) == at("2026-04-05T02:15")


def test_what_is_always_open_never_closes() -> None:
    hours = Hours(Schedule(windows=[window("00:00", "24:00")], zone="Europe/Berlin"))
    assert hours.is_open(0.0) and hours.closes_at(1e9) is None
    assert Hours(Schedule(windows=[window("08:00", "08:00")])).closes_at(1e9) is None


@pytest.mark.parametrize("now", [-1e18, 1e18])
def test_a_time_of_no_calendar_is_in_no_window(now: float) -> None:
    hours = Hours(Schedule(windows=[window("00:00", "24:00")]))
    assert not hours.is_open(now) and hours.next_opening(now) is None


@pytest.mark.parametrize("zone", ["Europe/Nowhere", "../../etc/passwd", "", "Europe", "/etc/localtime"])
def test_an_unknown_zone_is_refused_with_its_place(zone: str) -> None:
    with pytest.raises(UnknownZone):
        Hours(Schedule(windows=[window("00:00", "01:00")], zone=zone))
    for field in ("maintenance", "delivery.schedule"):
        spec: dict[str, object] = {"windows": [{"from": "22:00", "to": "05:00"}], "zone": zone}
        spec = {"delivery": {"schedule": spec}} if field != "maintenance" else {"maintenance": spec}
        document = {
            "apiVersion": "edgeward.dev/v1alpha1", "kind": "Site", "metadata": {"name": "s"}, "spec": spec,
        }  # fmt: skip
        with pytest.raises(InvalidDocument) as caught:
            parse_resource(document)
        assert caught.value.field == f"spec.{field}.zone" and "IANA" in caught.value.hint


def test_times_in_yaml_need_no_quotes() -> None:
    """YAML 1.1 reads 22:00 as 1320, a number of base 60; 1.2 does not."""
    (document,) = load_yaml("{from: 22:00, to: 05:30, odd: 1:30.5}", "x")
    assert document == {"from": "22:00", "to": "05:30", "odd": "1:30.5"}


@pytest.mark.parametrize("text", ["24:01", "7:00", "22:60", "22", "22:00:00", "22:00\n"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(msgspec.ValidationError):
        window(text, "05:00")


def test_a_rate_that_a_peer_would_cut_is_refused() -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"rate": 4095}, Delivery)
    assert msgspec.convert({"rate": 4096}, Delivery).rate == 4096


@pytest.mark.parametrize(
    ("written", "seconds"),
    [("2026-12-01T00:00:00+01:00", 1796079600.0), ("'2026-11-30T23:00:00Z'", 1796079600.0)],
)
def test_an_activation_time_is_an_instant(written: str, seconds: float) -> None:
    spec = parse_resource(load_yaml(ROLLOUT.format(written), "x")[0]).spec
    assert spec.activate_at.timestamp() == seconds
    assert msgspec.json.decode(msgspec.json.encode(spec), type=type(spec)) == spec


@pytest.mark.parametrize("written", ["2026-12-01T00:00:00", "2026-12-01", "tomorrow"])
def test_an_activation_time_without_an_offset_is_refused(written: str) -> None:
    with pytest.raises(InvalidDocument) as caught:
        parse_resource(load_yaml(ROLLOUT.format(written), "x")[0])
    assert caught.value.field == "spec.activateAt"


ROLLOUT = """
apiVersion: edgeward.dev/v1alpha1
kind: Rollout
metadata: {{name: r}}
spec: {{fleet: f, model: m, version: 1, activateAt: {}}}
"""
