"""Which controller a command talks to, and as whom."""

from __future__ import annotations

import os
from pathlib import Path

import typer

from edgeward.client import ControllerClient
from edgeward.errors import UsageError

DEFAULT_URL = "http://127.0.0.1:8470"

Url = typer.Option("--url", envvar="EDGEWARD_URL", help=f"The controller's address (default {DEFAULT_URL}).")
TokenFile = typer.Option(
    "--token-file",
    envvar="EDGEWARD_TOKEN_FILE",
    help="File that holds an API token; `edgeward up` writes `admin.token`. EDGEWARD_TOKEN holds one directly.",
)


def read_token(token_file: Path | None) -> str:
    """The API token from the file or from EDGEWARD_TOKEN. Raises UsageError when there is none."""
    if token_file is not None:
        try:
            return token_file.read_text().strip()
        except OSError as error:
            raise UsageError(f"cannot read the token file {token_file}: {error.strerror}") from None
    token = os.environ.get("EDGEWARD_TOKEN", "").strip()
    if not token:
        raise UsageError(
            "no API token given",
            hint="pass --token-file DATA/admin.token (written by `edgeward up`) or set EDGEWARD_TOKEN",
        )
    return token


def connect(url: str | None, token_file: Path | None) -> ControllerClient:
    return ControllerClient(url or DEFAULT_URL, read_token(token_file))
