"""Delta tables in a bucket. A PUT that has returned outlasts a power cut: nothing is flushed and nothing repaired.

A version is a PUT of its log entry with `If-None-Match: *`, so that of two writers one is told and tries the
next number (Delta protocol, "mutual exclusion"). A server that ignores the condition would lose commits
without a word; it is tried before the first write, and refused.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import obstore
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError
from obstore.exceptions import BaseError

from edgeward.errors import Conflict, Unavailable
from edgeward.object_store import S3Settings, check_kept, reason

log = logging.getLogger(__name__)

_HINT = "use a store that can, or leave --tables out: then tables lie in the store's folder"
_CONTENT = b"edgeward probe: written first"


class Bucket:
    """Where tables lie: one prefix for each, under that of `settings`. `fit` is called once it has been tried."""

    def __init__(self, settings: S3Settings, fit: Callable[[], None] = lambda: None) -> None:
        self.settings = settings
        self._fit = fit
        self.options: dict[str, str] | None = delta_options(settings)

    @property
    def shown(self) -> str:
        return self.settings.shown

    def uri(self, table: str) -> str:
        return f"s3://{self.settings.bucket}/{self.settings.prefix}{table}"

    def settle(self, table: str, done: int, seen: int) -> int:  # part of Place
        """A version has outlasted a power cut since its PUT returned: the newest that is known."""
        return max(done, seen)

    def settle_checkpoint(self, table: str) -> None:
        """Nothing is left to be done."""

    def repair(self, table: str, done: int) -> None:
        """Nothing can be damaged: an object is there whole or not at all."""

    def check(self) -> None:
        """Write and delete a small object under `probe/`.

        Raises Unavailable when the bucket cannot be reached or written, EdgewardError when its server does not
        know conditional writes.
        """
        bucket, key = self.settings.open(), f"probe/{secrets.token_hex(16)}"
        try:
            check_kept(
                bucket, self.settings, key, _CONTENT, danger="commits to the tables could be lost", hint=_HINT
            )
        finally:
            with suppress(BaseError, FileNotFoundError):
                obstore.delete(bucket, key)
        log.info("%s takes tables: conditional writes work", self.shown)
        self._fit()

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Raises Conflict when another writer was first, Unavailable for what S3 refuses or does not answer.

        TableNotFoundError passes.
        """
        try:
            yield
        except TableNotFoundError:
            raise
        except CommitFailedError as error:
            raise Conflict(
                f"the tables in {self.shown}: {reason(error)}", hint="nothing is lost; it is tried again"
            ) from None
        except (DeltaError, OSError) as error:
            raise Unavailable(
                f"the tables in {self.shown}: {reason(error)}",
                hint="is the server there, and are the keys right? rows stay in the journal meanwhile",
            ) from None


def delta_options(settings: S3Settings) -> dict[str, str]:
    """What deltalake takes as storage options. They hold the keys: not to be shown.

    Every option is set that deltalake would else take from an AWS variable which says something different.
    """
    options = {
        "aws_region": settings.region,
        "aws_allow_http": "true" if settings.endpoint.startswith("http://") else "false",
        "aws_conditional_put": "etag",
        "connect_timeout": "5s",
        "timeout": "120s",
        "max_retries": "3",
        "retry_timeout": "30s",
    }
    if settings.endpoint:
        options["aws_endpoint_url"] = settings.endpoint
    if settings.access_key:
        options["aws_access_key_id"] = settings.access_key
        options["aws_secret_access_key"] = settings.secret_key
    if settings.session_token:
        options["aws_session_token"] = settings.session_token
    return options
