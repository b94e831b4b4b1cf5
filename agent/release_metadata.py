"""The release metadata (TUF), judged by the trusted clock: see `agent/trusted_clock.py`.

A refresh that fails says nothing about any release: an attacker on the link or a wrong clock can make it
fail. So it is Unavailable, tried again, and never a reason to quarantine a model.
"""

from __future__ import annotations

import datetime
from pathlib import Path

from tuf.api.exceptions import DownloadError, ExpiredMetadataError, RepositoryError
from tuf.api.metadata import TOP_LEVEL_ROLE_NAMES, Signed, Timestamp
from tuf.ngclient import Updater, UpdaterConfig
from tuf.ngclient.fetcher import FetcherInterface

from agent.trusted_clock import LATEST, TrustedClock
from edgeward.errors import Unavailable
from edgeward.storage import fsync_folder, make_folder, write_atomic
from edgeward.wire.signed_time import TUF_FIELD


class _DurableUpdater(Updater):
    """python-tuf renames without fsync: a power cut could leave an empty timestamp, and with it no memory of the
    newest version that was seen. What is accepted here is on the disk before it is gone by."""

    def _persist_file(self, filename: str, data: bytes) -> None:
        path = Path(filename)
        # The root that it starts with is handed to it each time: no write for what is there.
        if not (path.is_file() and path.read_bytes() == data):
            write_atomic(path, data)


class MetadataExpired(Unavailable):
    """The release metadata is signed, but for a time that is over."""


class MetadataRefused(Unavailable):
    """The release metadata does not verify, is older than what was seen, or does not name the release."""


def refresh(folder: Path, url: str, fetcher: FetcherInterface, root: bytes, clock: TrustedClock) -> Updater:
    """An updater with the newest metadata below `url`, none of it expired by all that is known of the time.

    `root` is the root metadata trusted from the start, `folder` keeps what was accepted before. Raises
    Unavailable when the metadata cannot be had, MetadataRefused when it does not verify or is older than
    before, MetadataExpired when its time is over.
    """
    # python-tuf has no port for the disk; without these it would do its own writes, or go by the local clock.
    if not hasattr(Updater, "_persist_file"):
        raise Unavailable("this python-tuf cannot be made to fsync", hint="install the locked version")
    make_folder(folder / "root_history")
    try:
        updater = _DurableUpdater(str(folder), url, fetcher=fetcher, config=UpdaterConfig(), bootstrap=root)
        trusted = updater._trusted_set
        if not hasattr(trusted, "reference_time"):
            raise Unavailable("this python-tuf cannot be told the time", hint="install the locked version")
        trusted.reference_time = _time(clock.now())
        updater.refresh()
        # What was renamed by a run that was killed, or whose fsync failed, counts as accepted from here on.
        fsync_folder(folder / "root_history")
        fsync_folder(folder)
        timestamp = trusted.timestamp
        clock.learn(_signed_at(timestamp))
        # The timestamp may have proven that it is later than `reference_time`.
        for role in sorted(TOP_LEVEL_ROLE_NAMES):
            _check(trusted[role], clock.now())
    except DownloadError as error:
        raise Unavailable(f"release metadata cannot be had: {error}") from None
    except ExpiredMetadataError as error:
        raise MetadataExpired(
            f"the release metadata has expired: {error} (it is {_time(clock.now()):%Y-%m-%dT%H:%MZ} here)",
            hint="is this device's clock right, and does the controller renew its metadata?",
        ) from None
    except RepositoryError as error:
        raise MetadataRefused(f"the release metadata does not verify: {error}") from None
    return updater


def _check(signed: Signed, now: float) -> None:
    if signed.is_expired(_time(now)):
        raise ExpiredMetadataError(f"{signed.type}.json is expired")


def _signed_at(timestamp: Timestamp) -> float:
    value = timestamp.unrecognized_fields.get(TUF_FIELD)
    return float(value) if isinstance(value, int) and 0 <= value <= LATEST else 0.0


def _time(at: float) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(min(max(at, 0.0), LATEST), datetime.UTC)
