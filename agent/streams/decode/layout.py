"""Where in a sample its time, key and features lie: a payload spec, checked and parsed once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edgeward.errors import InvalidDocument
from edgeward.paths import Path, parse_path
from edgeward.wire.streams import Check, PayloadSource, TimeUnit


@dataclass(frozen=True, slots=True)
class Layout:
    """`features` in the model's order; `paths` leads to each from the sample's root, `units` has "" for any.

    `time` and `key` are None where the source has none. `values` leads to the object that must be there
    for the features without a path of their own; None when all of them have one.
    """

    features: tuple[str, ...]
    paths: tuple[Path, ...]
    units: tuple[str, ...]
    time: Path | None
    time_unit: TimeUnit
    key: Path | None
    values: Path | None
    sequence: bool
    time_text: str
    key_text: str
    values_text: str


def layout_of(source: PayloadSource, features: Sequence[str], quality: Mapping[str, Check]) -> Layout:
    """Raises InvalidDocument for a path that is none, or a field that is not one of the features."""
    for name in source.fields:
        if name not in features:
            raise InvalidDocument("not one of the features", field=f"spec.source.fields.{name}")
    values = parse_path(source.values, "spec.source.values")
    paths = tuple(
        parse_path(source.fields[name], f"spec.source.fields.{name}")
        if name in source.fields
        else (*values, name)
        for name in features
    )
    for name, path in zip(features, paths, strict=True):
        if not path:
            raise InvalidDocument("leads to the whole sample", field=f"spec.source.fields.{name}")
    return Layout(
        features=tuple(features),
        paths=paths,
        units=tuple(quality[name].unit if name in quality else "" for name in features),
        time=parse_path(source.time, "spec.source.time") if source.time else None,
        time_unit=source.time_unit,
        key=parse_path(source.key, "spec.source.key") if source.key else None,
        values=None if len(source.fields) == len(features) else values,
        sequence=source.sequence,
        time_text=source.time,
        key_text=source.key,
        values_text=source.values,
    )
