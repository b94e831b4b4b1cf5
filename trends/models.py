"""The `models` dimension: one row per model digest that results or trends name, with what is known of it.

Where and when it was seen comes from the tables; model, version and lineage from the manifest, which the
controller keeps. It can be made anew at any time, so losing its last state costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import pyarrow as pa
from deltalake import write_deltalake

from edgeward.client import ControllerClient
from edgeward.errors import DigestMismatch, NotFound
from edgeward.storage import sha256_hex
from edgeward.wire.package import MAX_MANIFEST_BYTES, Manifest, decode_manifest
from edgeward.wire.trend_query import Group
from trends.tables import NO_HOOKS, Tables

TABLE = "models"
_TIME = pa.timestamp("us", tz="UTC")
_SEEN = pa.struct(
    [
        ("site", pa.string()),
        ("variant", pa.string()),
        ("first_seen", _TIME),
        ("last_seen", _TIME),
        ("rows", pa.int64()),
    ]
)
SCHEMA = pa.schema(
    [
        ("digest", pa.string()), ("model", pa.string()), ("version", pa.int64()), ("first_seen", _TIME),
        ("last_seen", _TIME), ("seen", pa.list_(_SEEN)), ("created_at", pa.string()), ("recipe", pa.string()),
        ("parameters", pa.string()), ("dataset", pa.string()), ("dataset_digest", pa.string()),
        ("dataset_rows", pa.int64()), ("split", pa.string()), ("libraries", pa.string()), ("code", pa.string()),
        ("metrics", pa.map_(pa.string(), pa.float64())),
    ]
)  # fmt: skip
#: What the manifest says; kept when a later refresh cannot reach the controller.
_FROM_MANIFEST = tuple(
    name for name in SCHEMA.names if name not in ("digest", "first_seen", "last_seen", "seen")
)

VACUUM_HOURS = 24


class Models:
    """The dimension of one trend store."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables

    def table(self) -> pa.Table:
        """All rows; none before the first refresh."""
        opened, _ = self._tables.snapshot(TABLE)
        if opened is None:
            return SCHEMA.empty_table()
        return opened.to_pyarrow_table().select(SCHEMA.names).cast(SCHEMA)

    def names(self) -> pa.Table:
        """`digest, model, version` to join with."""
        return self.table().select(["digest", "model", "version"])

    def digests(self, filters: Mapping[Group, list[str]]) -> set[str] | None:
        """The digests of the models and versions that `filters` name; None where they name none.

        Raises NotFound when no digest is known to be of them.
        """
        models, versions = filters.get("model"), filters.get("version")
        if models is None and versions is None:
            return None
        found = {
            row["digest"]
            for row in self.names().to_pylist()
            if (models is None or row["model"] in models)
            and (versions is None or str(row["version"]) in versions)
        }
        if not found:
            asked = " version ".join(", ".join(values) for values in (models, versions) if values is not None)
            raise NotFound(
                f"no digest is known here to be {asked}",
                hint="`edgeward trends models --refresh --url … --token-file …` asks the controller",
            )
        return found

    def write(self, rows: pa.Table) -> None:
        """Replace the dimension. Raises Unavailable, OSError, DeltaError."""
        with self._tables.guarded():
            write_deltalake(
                self._tables.uri(TABLE),
                rows,
                mode="overwrite",
                schema_mode="overwrite",
                storage_options=self._tables.options,
                post_commithook_properties=NO_HOOKS,
            )
            self._tables.settle(TABLE)
            opened, _ = self._tables.snapshot(TABLE)
            if opened is not None:
                opened.vacuum(
                    retention_hours=VACUUM_HOURS,
                    dry_run=False,
                    enforce_retention_duration=False,
                    post_commithook_properties=NO_HOOKS,
                )
                self._tables.settle(TABLE)


def dimension(seen: list[dict[str, Any]], known: pa.Table, manifests: Mapping[str, Manifest]) -> pa.Table:
    """Rows of `seen` (`digest, site, variant, first_seen, last_seen, rows`) by digest. Pure.

    What `known` says of a digest stays where `manifests` has nothing on it.
    """
    before = {row["digest"]: row for row in known.to_pylist()}
    by_digest: dict[str, list[dict[str, Any]]] = {}
    for item in seen:
        by_digest.setdefault(item["digest"], []).append({key: item[key] for key in _SEEN.names})
    rows = []
    for digest, places in sorted(by_digest.items()):
        row: dict[str, Any] = {name: before.get(digest, {}).get(name) for name in _FROM_MANIFEST}
        if digest in manifests:
            row |= _described(manifests[digest])
        row["digest"] = digest
        row["first_seen"] = min(place["first_seen"] for place in places)
        row["last_seen"] = max(place["last_seen"] for place in places)
        row["seen"] = sorted(places, key=lambda place: (place["site"], place["variant"]))
        rows.append(row)
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def _described(manifest: Manifest) -> dict[str, Any]:
    lineage = manifest.lineage
    return {
        "model": manifest.model, "version": manifest.version, "created_at": manifest.created_at,
        "recipe": lineage.recipe, "parameters": msgspec.json.encode(lineage.parameters).decode(),
        "dataset": lineage.dataset, "dataset_digest": lineage.dataset_digest, "dataset_rows": lineage.rows,
        "split": lineage.split, "libraries": msgspec.json.encode(lineage.libraries).decode(), "code": lineage.code,
        "metrics": list(manifest.metrics.items()),
    }  # fmt: skip


def fetch_manifests(
    client: ControllerClient, digests: list[str], missing: Callable[[str], None] = lambda digest: None
) -> dict[str, Manifest]:
    """The manifests of `digests` from the controller's artifacts; `missing` is told those it does not have.

    A manifest is believed because its SHA-256 is the digest that rows name, whoever sent it. Raises
    DigestMismatch, InvalidDocument, and what the client raises.
    """
    found: dict[str, Manifest] = {}
    for digest in digests:
        data = bytearray()
        try:
            for piece in client.artifact(digest):
                data += piece
                if len(data) > MAX_MANIFEST_BYTES:
                    break
        except NotFound:
            missing(digest)
            continue
        if sha256_hex(bytes(data)) != digest:
            raise DigestMismatch(
                f"the controller's manifest of {digest[:12]} is not that one", hint="nothing of it was stored"
            )
        found[digest] = decode_manifest(bytes(data), source=digest[:12])
    return found
