"""`edgeward up`: the fleet controller."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from controller.downloads import Limits
from edgeward.errors import MissingDependency


def register(app: typer.Typer) -> None:
    """Add this package's commands to `app`."""
    app.command()(up)


def _log_to_stderr() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("alembic").setLevel(logging.WARNING)


def up(
    data: Annotated[Path, typer.Option("--data", help="Folder for keys, database and artifacts.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="HTTP port; 0 picks a free one.")] = 8470,
    broker: Annotated[
        str | None, typer.Option("--broker", help="mqtt(s)://HOST[:PORT]; without it one is embedded.")
    ] = None,
    broker_port: Annotated[
        int, typer.Option("--broker-port", min=0, max=65535, help="Port of the embedded broker (MQTT v5).")
    ] = 1883,
    broker_port_311: Annotated[
        int | None,
        typer.Option(
            "--broker-port-311", min=1, max=65535, help="A second port of it, for clients of MQTT 3.1.1."
        ),
    ] = None,
    database: Annotated[
        str | None,
        typer.Option(
            "--database",
            envvar="EDGEWARD_DATABASE",
            help="sqlite:///FILE or postgresql+psycopg://USER@HOST/NAME; by default SQLite in the data folder.",
        ),
    ] = None,
    downloads: Annotated[
        int, typer.Option(min=1, max=1024, help="Artifacts downloaded at once; others are told to wait.")
    ] = Limits.downloads,
    artifacts: Annotated[
        str,
        typer.Option(
            envvar="EDGEWARD_ARTIFACTS",
            help="s3://BUCKET[/PREFIX]: keep artifacts there, and send devices to it; by default in the data"
            " folder. Endpoint, region and keys: AWS_ENDPOINT_URL_S3, AWS_REGION, AWS_ACCESS_KEY_ID,"
            " AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN.",
        ),
    ] = "",
    artifacts_credentials: Annotated[
        Path | None,
        typer.Option(
            envvar="AWS_SHARED_CREDENTIALS_FILE",
            help="A file like ~/.aws/credentials with the keys, mode 0600; AWS_PROFILE chooses the section.",
        ),
    ] = None,
    renewal_grace: Annotated[
        float,
        typer.Option(
            "--renewal-grace",
            min=0,
            help="Days after its end in which a device may still renew its certificate by itself.",
        ),
    ] = 90.0,
) -> None:
    """Run the fleet controller until it is told to stop.

    Example: `edgeward up --data ./data` then `edgeward get devices --token-file data/admin.token`
    """
    _log_to_stderr()
    try:
        from controller.serve import serve
    except ImportError as error:
        raise MissingDependency(
            f"the controller is not installed completely: {error.name}",
            hint="pip install 'edgeward[controller]'",
        ) from None
    serve(
        data,
        host,
        port,
        broker=broker,
        broker_port=broker_port,
        broker_port_311=broker_port_311,
        database=database or "",
        downloads=Limits(downloads),
        renewal_grace=renewal_grace * 86400.0,
        artifacts=artifacts,
        credentials=artifacts_credentials,
    )
