"""Which controller a command talks to, and as whom."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer

from edgeward.client import ControllerClient
from edgeward.errors import Forbidden, UsageError

DEFAULT_URL = "http://127.0.0.1:8470"

Url = typer.Option("--url", envvar="EDGEWARD_URL", help=f"The controller's address (default {DEFAULT_URL}).")
TokenFile = typer.Option(
    "--token-file",
    envvar="EDGEWARD_TOKEN_FILE",
    help="File that holds an API token; `edgeward up` writes `admin.token`. EDGEWARD_TOKEN holds one directly.",
)


def read_secret(path: Path) -> str:
    """A token from a file. Raises UsageError naming the file when there is none in it."""
    try:
        text = path.read_bytes().decode("ascii", errors="replace")
    except OSError as error:
        raise UsageError(f"{path}: cannot read the token: {error.strerror}") from None
    return _checked(text.strip(), str(path))


def _checked(secret: str, source: str) -> str:
    if not secret or not secret.isascii() or not secret.isprintable() or " " in secret:
        raise UsageError(f"{source}: holds no token", hint="expected one word in ASCII, as it was printed")
    return secret


def read_token(token_file: Path | None) -> str:
    """The API token from the file or from EDGEWARD_TOKEN. Raises UsageError when there is none."""
    if token_file is not None:
        return read_secret(token_file)
    token = os.environ.get("EDGEWARD_TOKEN", "").strip()
    if not token:
        raise UsageError(
            "no API token given",
            hint="pass --token-file DATA/admin.token (written by `edgeward up`) or set EDGEWARD_TOKEN",
        )
    return _checked(token, "EDGEWARD_TOKEN")


def connect(url: str | None, token_file: Path | None) -> ControllerClient:
    source = str(token_file) if token_file else "EDGEWARD_TOKEN"
    return ControllerClient(url or DEFAULT_URL, read_token(token_file), token_source=source)


@contextmanager
def naming(token_file: Path) -> Iterator[None]:
    """Within, a refusal names the file whose token was refused."""
    try:
        yield
    except Forbidden as error:
        raise Forbidden(f"{token_file}: {error.message}", hint=error.hint) from None
