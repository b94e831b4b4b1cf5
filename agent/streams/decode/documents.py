"""JSON and MessagePack: one object per message or an array of them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from agent.streams.decode import times
from agent.streams.decode.columns import (
    MAX_EPOCH,
    MAX_SEQ,
    arrival,
    by_epoch,
    check_count,
    clean_text,
    keep_finite,
    settle_times,
)
from agent.streams.decode.layout import layout_of
from agent.streams.decode.strict import message_type, strict_form
from agent.streams.samples import Samples
from edgeward.errors import InvalidDocument
from edgeward.paths import MISSING, lookup
from edgeward.wire.streams import Check, PayloadSource

# ValueError covers bad UTF-8 and all of msgspec's own errors.
_UNDECODABLE = (ValueError, RecursionError)


class DocumentDecoder:
    """Tries the strict type first; what does not fit it is read value by value, so that one bad reading
    costs only its own sample."""

    def __init__(self, source: PayloadSource, features: Sequence[str], quality: Mapping[str, Check]) -> None:
        self._layout = layout_of(source, features, quality)
        self._form = strict_form(self._layout)
        self._read = _read_json if source.format == "json" else _read_msgpack
        self._strict: Callable[[bytes], Any] | None = None
        if self._form is not None:
            kind = message_type(self._form)
            self._strict = (
                msgspec.json.Decoder(kind) if source.format == "json" else msgspec.msgpack.Decoder(kind)
            ).decode

    def decode(self, payload: bytes, arrived: float, topic: str = "") -> list[Samples]:
        """The samples of one message in their order, one part per run of a sensor epoch.

        `arrived` is in seconds since 1970. Raises InvalidDocument when the message is no samples at all;
        a sample that lacks a finite reading, a time or the right unit comes back with a problem.
        """
        if self._strict is not None:
            try:
                document = self._strict(payload)
            except _UNDECODABLE:
                return self._tolerant(payload, arrived)
            return self._columns(document if isinstance(document, list) else [document], arrived)
        return self._tolerant(payload, arrived)

    def _columns(self, rows: list[Any], arrived: float) -> list[Samples]:
        form, layout = self._form, self._layout
        assert form is not None
        if not rows:
            return []
        problems: dict[int, str] = {}
        at = form.times(rows)
        event_time = (
            np.full(len(rows), arrival(arrived))
            if at is None
            else settle_times(at, arrived, self._no_time(), problems)
        )
        values = form.values(rows)
        keep_finite(values, layout.features, problems)
        samples = Samples(event_time, values, form.keys(rows), "", form.seqs(rows), problems)
        return by_epoch(samples, form.epochs(rows))

    def _tolerant(self, payload: bytes, arrived: float) -> list[Samples]:
        document = self._read(payload)
        items = document if isinstance(document, list) else [document]
        check_count(len(items))
        if items and not any(isinstance(item, dict) for item in items):
            raise InvalidDocument(f"expected an object, got {type(items[0]).__name__}")
        layout = self._layout
        values = np.full((len(items), len(layout.features)), np.nan)
        event_time = np.full(len(items), arrival(arrived))
        keys: list[str] = []
        epochs: list[str] = []
        seqs: list[int] = []
        problems: dict[int, str] = {}
        for row, item in enumerate(items):
            if layout.sequence:
                epoch, seq = _numbered(item)
                epochs.append(epoch)
                seqs.append(seq)
            problem = "" if isinstance(item, dict) else "not an object"
            if layout.time is not None:
                at = times.microseconds(lookup(item, layout.time), layout.time_unit)
                if at != times.NO_TIME:
                    event_time[row] = at
                else:
                    problem = problem or self._no_time()
            if layout.key is not None:
                text, wrong = _key(lookup(item, layout.key))
                keys.append(text)
                if wrong and not problem:
                    problem = f"{layout.key_text}: {wrong}"
            if layout.values and not problem:
                inner = lookup(item, layout.values)
                if inner is not MISSING and not isinstance(inner, dict):
                    problem = f"{layout.values_text}: not an object"
            for index, path in enumerate(layout.paths):
                number, wrong = _reading(lookup(item, path), layout.units[index])
                values[row, index] = number
                if wrong and not problem:
                    problem = f"{layout.features[index]}: {wrong}"
            if problem:
                problems[row] = problem
        keep_finite(values, layout.features, problems)
        numbers = np.array(seqs, dtype=np.int64) if layout.sequence else None
        return by_epoch(Samples(event_time, values, tuple(keys), "", numbers, problems), epochs)

    def _no_time(self) -> str:
        return f"{self._layout.time_text}: {times.describe(self._layout.time_unit)}"


def _numbered(item: Any) -> tuple[str, int]:
    """The sensor's epoch and number. Raises InvalidDocument: without them no position can be told."""
    epoch, seq = lookup(item, ("epoch",)), lookup(item, ("seq",))
    if not isinstance(epoch, str) or not 1 <= len(epoch) <= MAX_EPOCH or clean_text(epoch) != epoch:
        raise InvalidDocument(f"expected a text of 1-{MAX_EPOCH} characters", field="epoch")
    if not isinstance(seq, int) or isinstance(seq, bool) or not 0 <= seq < MAX_SEQ:
        raise InvalidDocument("expected a whole number >= 0", field="seq")
    return epoch, seq


def _key(value: Any) -> tuple[str, str]:
    """The key and what is wrong with it."""
    if value is MISSING or value is None:
        return "", ""
    if isinstance(value, bool):
        return str(value).lower(), ""
    if isinstance(value, str | int | float):
        return clean_text(str(value)), ""
    return "", "not a text or a number"


def _reading(value: Any, unit: str) -> tuple[float, str]:
    """The number, NaN where there is none, and what is wrong beyond that."""
    if isinstance(value, dict):
        given = value.get("unit")
        if unit and given is not None and given != unit:
            return math.nan, f"unit is {clean_text(str(given))!r}, expected {unit!r}"
        value = value.get("value")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan, ""
    try:
        return float(value), ""
    except OverflowError:
        return math.nan, ""


def _read_json(payload: bytes) -> Any:
    try:
        return msgspec.json.decode(payload)
    except _UNDECODABLE as error:
        refusal = InvalidDocument(f"not JSON: {error}")
    # Many sensors write NaN or 1e999, which strict JSON refuses. That costs the sample, not the message.
    try:
        return json.loads(payload)
    except (ValueError, RecursionError):
        raise refusal from None


def _read_msgpack(payload: bytes) -> Any:
    try:
        return msgspec.msgpack.decode(payload)
    except _UNDECODABLE as error:
        raise InvalidDocument(f"not MessagePack: {error}") from None
