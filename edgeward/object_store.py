"""S3 as both the controller and the trend store use it: where it is, with which keys, and what it must be able to do.

Bucket and prefix come from the command line, endpoint and region from the AWS variables or a private file. Keys
come from the environment or from a file that only its owner can read, never from the command line.
"""

from __future__ import annotations

import configparser
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import S3Store

from edgeward.errors import EdgewardError, InvalidDocument, NotFound, TrustError, Unavailable

if TYPE_CHECKING:
    from obstore.store import S3Config  # exists for type checkers only

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_SEGMENT = re.compile(r"[A-Za-z0-9._-]+")
_FILE_KEYS = {
    "aws_access_key_id": "AWS_ACCESS_KEY_ID",
    "aws_secret_access_key": "AWS_SECRET_ACCESS_KEY",
    "aws_session_token": "AWS_SESSION_TOKEN",
    "region": "AWS_REGION",
    "endpoint_url": "AWS_ENDPOINT_URL_S3",
}


@dataclass(frozen=True)
class S3Settings:
    """`prefix` ends in a slash unless it is empty. `endpoint` empty: AWS's own of the region.

    Without `access_key` the keys come from where the machine runs (web identity, container, instance).
    """

    bucket: str
    prefix: str = ""
    endpoint: str = ""
    region: str = "us-east-1"
    access_key: str = field(default="", repr=False)
    secret_key: str = field(default="", repr=False)
    session_token: str = field(default="", repr=False)

    @property
    def shown(self) -> str:
        """For messages."""
        at = f" at {self.endpoint}" if self.endpoint else f" in {self.region}"
        return f"s3://{self.bucket}/{self.prefix}{at}"

    def open(self) -> S3Store:
        """Opens no connection yet."""
        config: S3Config = {
            "region": self.region,
            "conditional_put": "etag",
            # CopyObject has no condition on its target; the end of a multipart upload has.
            "copy_if_not_exists": "multipart",
        }
        if self.endpoint:
            config["endpoint"] = self.endpoint
        if self.access_key:
            config |= {"access_key_id": self.access_key, "secret_access_key": self.secret_key}
        if self.session_token:
            config["session_token"] = self.session_token
        return S3Store(
            self.bucket,
            prefix=self.prefix or None,
            config=config,
            client_options={
                "allow_http": self.endpoint.startswith("http://"),
                "connect_timeout": "5s",
                "timeout": "120s",
            },
            retry_config={"max_retries": 3, "retry_timeout": timedelta(seconds=30)},
        )


def settings_from(
    address: str, environment: Mapping[str, str], file: Path | None = None, *, option: str = "--artifacts"
) -> S3Settings:
    """What `s3://bucket/prefix` means with these variables, and with `file` in the form of `~/.aws/credentials`.

    What the file says counts more than the variables. `option` is what the address was given by, and
    `{option}-credentials` the file. Raises InvalidDocument; NotFound without the file;
    TrustError when others may read it.
    """
    bucket, prefix = _parse(address, option)
    known = {**environment, **(_read(file, environment.get("AWS_PROFILE") or "default") if file else {})}

    def first(*names: str) -> str:
        return next((known[name] for name in names if known.get(name)), "")

    endpoint = first("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL").rstrip("/")
    if endpoint and not _is_endpoint(endpoint):
        raise InvalidDocument(
            "is not an address of an S3 server",
            source="AWS_ENDPOINT_URL_S3",
            hint="expected http(s)://host[:port], without credentials",
        )
    access, secret = first("AWS_ACCESS_KEY_ID"), first("AWS_SECRET_ACCESS_KEY")
    if bool(access) != bool(secret):
        missing = "AWS_SECRET_ACCESS_KEY" if access else "AWS_ACCESS_KEY_ID"
        raise InvalidDocument(f"{missing} is missing", source=address, hint="set both, or neither")
    return S3Settings(
        bucket,
        prefix,
        endpoint,
        first("AWS_REGION", "AWS_DEFAULT_REGION") or "us-east-1",
        access,
        secret,
        first("AWS_SESSION_TOKEN") if access else "",
    )


def _parse(address: str, option: str) -> tuple[str, str]:
    if "@" in address:  # not shown again: it may be a key
        raise InvalidDocument(
            "an S3 address holds no credentials",
            source=option,
            hint=f"set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or pass {option}-credentials FILE",
        )
    parts = urlsplit(address)
    segments = [part for part in parts.path.split("/") if part]
    fits = (
        parts.scheme == "s3"
        and _BUCKET.fullmatch(parts.netloc)
        and all(_SEGMENT.fullmatch(part) and part not in (".", "..") for part in segments)
        and not parts.query
        and not parts.fragment
    )
    if not fits:
        raise InvalidDocument(
            f"{address!r} is no place in S3",
            source=option,
            hint="expected s3://BUCKET[/PREFIX]",
        )
    return parts.netloc, "".join(f"{part}/" for part in segments)


def _is_endpoint(text: str) -> bool:
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        return False
    bare = not (parts.query or parts.fragment or parts.username or parts.password or parts.path)
    return parts.scheme in ("http", "https") and bool(parts.hostname) and bare and port != 0


def _read(file: Path, profile: str) -> dict[str, str]:
    if not file.is_file():
        raise NotFound(
            f"there is no file {file} with credentials", hint="it has the form of ~/.aws/credentials"
        )
    if file.stat().st_mode & 0o077:
        raise TrustError(f"{file}: others may read these credentials", hint=f"chmod 600 {file}")
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read_string(file.read_text())
        section = parser[profile]
    except (configparser.Error, UnicodeDecodeError, KeyError):
        # Without the parser's own words: they quote the line.
        raise InvalidDocument(
            f"has no section [{profile}] of `name = value` lines",
            source=str(file),
            hint="it has the form of ~/.aws/credentials; AWS_PROFILE chooses the section",
        ) from None
    return {variable: section[key] for key, variable in _FILE_KEYS.items() if section.get(key)}


@contextmanager
def translated(settings: S3Settings, what: str) -> Iterator[None]:
    """Raises Unavailable for what S3 refuses or does not answer. FileNotFoundError and AlreadyExistsError pass."""
    try:
        yield
    except AlreadyExistsError:
        raise
    except BaseError as error:
        raise Unavailable(
            f"cannot {what} {settings.shown}: {reason(error)}",
            hint="are endpoint, bucket and keys right? they come from the AWS_ variables or the credentials file",
        ) from None


def reason(error: BaseException) -> str:
    """What S3 said, without addresses, request numbers and the library's own account of it."""
    text = _COLOURS.sub("", str(error))
    said = re.search(r"<Code>(\w{1,64})</Code>\s*<Message>([^<]{0,300})", text)
    if said:
        return f"{said[1]}: {said[2]}"
    status = re.search(r"status code: (\d{3}[ A-Za-z]{0,40})", text)
    if status:
        return f"it answered {status[1]}"
    if "dns error" in text:
        return "its name cannot be resolved"
    system = re.search(r'message: "([^"]{1,100})"', text)
    if system:
        return system[1]
    # deltalake gives a chain, one cause to a line and the first of all at its end.
    causes = [line.partition("\u21b3")[2].strip() for line in text.splitlines() if "\u21b3" in line]
    return causes[-1][:200] if causes else text.partition("\n")[0].rpartition(": ")[2][:200]


def check_kept(
    bucket: S3Store, settings: S3Settings, key: str, content: bytes, *, danger: str, hint: str
) -> None:
    """Write an object under a free name, read it, and see that a second PUT for that name is refused.

    `danger` says what follows where it is not. The object stays. Raises Unavailable when the bucket cannot be
    reached or written, EdgewardError when it does not keep what is in it.
    """
    with translated(settings, "write to"):
        obstore.put(bucket, key, content, mode="create")
    if read_object(bucket, settings, key) != content:
        raise EdgewardError(f"{settings.shown} does not give back what was written", hint=hint)
    refuses(
        settings,
        "PUT with If-None-Match",
        lambda: obstore.put(bucket, key, b"edgeward probe: must not replace it", mode="create"),
        danger=danger,
        hint=hint,
    )
    if read_object(bucket, settings, key) != content:
        raise EdgewardError(f"{settings.shown} has overwritten an object that it said it kept", hint=hint)


def refuses(settings: S3Settings, what: str, write: Callable[[], object], *, danger: str, hint: str) -> None:
    """Raises EdgewardError unless `write`, whose condition does not hold, is refused for that reason."""
    try:
        write()
    except AlreadyExistsError:
        return
    except BaseError as error:
        raise EdgewardError(f"{settings.shown} does not know {what}: {reason(error)}", hint=hint) from None
    raise EdgewardError(f"{settings.shown} ignores {what}: {danger}", hint=hint)


def read_object(bucket: S3Store, settings: S3Settings, key: str) -> bytes | None:
    """None when there is none. Raises Unavailable."""
    with translated(settings, "read from"):
        try:
            return bytes(obstore.get(bucket, key).bytes())
        except FileNotFoundError:
            return None
