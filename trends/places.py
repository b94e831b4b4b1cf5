"""Where a store's tables lie: in its folder, or in the bucket that it has been told once and remembers.

What is remembered is no secret. Keys come from the AWS variables or from the file that was named, each time.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec
from msgspec import Struct

from edgeward.errors import Conflict, InvalidDocument, MissingDependency
from edgeward.storage import write_atomic
from trends.local_files import LocalFolder
from trends.tables import Place

_FILE = "tables.json"
_OPTION = "--tables"


class Remembered(Struct, frozen=True, forbid_unknown_fields=True):
    """`credentials` is the absolute path of the file with the keys; empty: they are in the AWS variables."""

    address: str
    endpoint: str = ""
    region: str = ""
    credentials: str = ""


def place_of(
    folder: Path, environment: Mapping[str, str], address: str = "", credentials: Path | None = None
) -> Place:
    """Where the tables of the store in `folder` lie; `address` is `s3://bucket/prefix`, empty: as remembered.

    Raises Conflict when they lie elsewhere already, InvalidDocument, NotFound and TrustError for settings that
    cannot be used, MissingDependency.
    """
    known = read_remembered(folder)
    local = folder / "tables"
    if not address and known is None:
        return LocalFolder(local)
    if known is None and any(local.glob("*/_delta_log")):
        raise Conflict(
            f"the tables of this store lie in {local}",
            hint=f"docs/storage.md says how to move them; {_OPTION} is for a store without tables there",
        )
    if known is not None and address and _plain(address) != known.address:
        raise Conflict(
            f"the tables of this store lie in {known.address}",
            hint=f"leave {_OPTION} out, or see docs/storage.md about moving them",
        )
    return _bucket(folder, environment, address, credentials, known)


def _bucket(
    folder: Path,
    environment: Mapping[str, str],
    address: str,
    credentials: Path | None,
    known: Remembered | None,
) -> Place:
    try:
        from edgeward.object_store import settings_from
        from trends.bucket import Bucket
    except ImportError as error:
        raise MissingDependency(
            f"tables in S3 need {error.name}", hint="pip install 'edgeward[trends,s3]'"
        ) from None
    found = dict(environment)
    if credentials is None and (named := found.get("AWS_SHARED_CREDENTIALS_FILE")):
        credentials = Path(named)
    if known is not None:
        if not any(found.get(name) for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")):
            found["AWS_ENDPOINT_URL_S3"] = known.endpoint
        if not any(found.get(name) for name in ("AWS_REGION", "AWS_DEFAULT_REGION")):
            found["AWS_REGION"] = known.region
        if credentials is None and known.credentials and not found.get("AWS_ACCESS_KEY_ID"):
            credentials = Path(known.credentials)
    settings = settings_from(address or (known.address if known else ""), found, credentials, option=_OPTION)
    return Bucket(
        settings,
        lambda: remember(
            folder,
            Remembered(
                _plain(f"s3://{settings.bucket}/{settings.prefix}"),
                settings.endpoint,
                settings.region,
                str(credentials.absolute()) if credentials else "",
            ),
        ),
    )


def _plain(address: str) -> str:
    return address.rstrip("/")


def read_remembered(folder: Path) -> Remembered | None:
    """None when the tables lie in the folder, or nowhere yet. Raises InvalidDocument."""
    path = folder / _FILE
    try:
        return msgspec.json.decode(path.read_bytes(), type=Remembered)
    except FileNotFoundError:
        return None
    except msgspec.DecodeError as error:
        raise InvalidDocument(
            str(error), source=str(path), hint="`edgeward trends serve --tables` writes it"
        ) from None


def remember(folder: Path, found: Remembered) -> None:
    if read_remembered(folder) != found:
        write_atomic(folder / _FILE, msgspec.json.encode(found))
