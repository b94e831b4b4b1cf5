"""Whether an S3 endpoint can do what artifacts need, tried out before the controller serves anybody."""

from __future__ import annotations

import logging
import secrets
from contextlib import suppress
from datetime import timedelta

import obstore
from obstore.exceptions import BaseError

from controller.artifacts.s3 import S3Artifacts
from edgeward.client.transport import signed_get
from edgeward.errors import EdgewardError, Unavailable
from edgeward.object_store import check_kept, read_object, refuses, translated

log = logging.getLogger(__name__)

_HINT = "use a store that can, or leave --artifacts out: then artifacts lie in the data folder"
_DANGER = "released models could be overwritten"
_FIRST, _SECOND = b"edgeward probe: written first", b"edgeward probe: must not replace it"


def probe(artifacts: S3Artifacts) -> None:
    """Write, read, try to overwrite, sign and fetch two small objects under `probe/`, then delete them.

    Raises Unavailable when the bucket cannot be reached or written, EdgewardError when an object can be
    overwritten or a signed URL does not give its bytes.
    """
    settings, bucket = artifacts.settings, artifacts.bucket
    key, other = (f"probe/{secrets.token_hex(16)}" for _ in range(2))
    try:
        check_kept(bucket, settings, key, _FIRST, danger=_DANGER, hint=_HINT)
        with translated(settings, "write to"):
            obstore.put(bucket, other, _SECOND, use_multipart=True)
        refuses(
            settings,
            "CompleteMultipartUpload with If-None-Match",
            lambda: obstore.copy(bucket, other, key, overwrite=False),
            danger=_DANGER,
            hint=_HINT,
        )
        if read_object(bucket, settings, key) != _FIRST:
            raise EdgewardError(
                f"{settings.shown} has overwritten an object that it said it kept", hint=_HINT
            )
        _check_signed(artifacts, key)
    finally:
        for each in (key, other):
            with suppress(BaseError, FileNotFoundError):
                obstore.delete(bucket, each)
    log.info("%s keeps artifacts: conditional writes and signed URLs work", settings.shown)


def _check_signed(artifacts: S3Artifacts, key: str) -> None:
    """A part by the signed URL, and nothing without the signature."""
    shown = artifacts.settings.shown
    with translated(artifacts.settings, "sign a URL for"):
        url = obstore.sign(artifacts.bucket, "GET", key, timedelta(minutes=1))
    try:
        with signed_get(url, headers={"Range": "bytes=9-13"}) as answer:
            body = answer.read()
    except Unavailable as error:
        raise Unavailable(
            f"{shown} does not answer a pre-signed URL: {error.message}",
            hint="devices fetch by such URLs; is the endpoint's clock right, and its certificate known here?",
        ) from None
    if (answer.status_code, body) != (206, _FIRST[9:14]):
        raise EdgewardError(f"{shown} does not give a part of an object by a pre-signed URL", hint=_HINT)
    with suppress(Unavailable), signed_get(url.partition("?")[0]) as unsigned:
        if unsigned.status_code == 200:
            log.warning("%s gives objects to anybody, without a signature: make the bucket private", shown)
