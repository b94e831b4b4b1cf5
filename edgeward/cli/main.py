"""Entry of the `edgeward` command.

Commands of the applications (controller, agent, trends, models, simulators) join through the
entry-point group `edgeward.commands`, so that this package imports none of them and an install with
one extra has the commands of that extra. Each entry is a function `register(app)` in a module that
imports nothing heavy.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys

import typer
from rich.console import Console

import edgeward
from edgeward.cli import bundle, devices, resources
from edgeward.errors import EdgewardError

GROUP = "edgeward.commands"

errors = Console(stderr=True, highlight=False, soft_wrap=True)


def build() -> typer.Typer:
    app = typer.Typer(
        name="edgeward",
        help="Train models, roll them out to edge fleets, and bring back what they saw.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode="markdown",
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @app.callback(invoke_without_command=True)
    def root(
        context: typer.Context,
        version: bool = typer.Option(False, "--version", help="Print the version and exit."),
    ) -> None:
        if version:
            print(f"edgeward {edgeward.__version__}")
            raise typer.Exit

    resources.register(app)
    devices.register(app)
    bundle.register(app)
    for entry in sorted(importlib.metadata.entry_points(group=GROUP), key=lambda found: found.name):
        entry.load()(app)
    return app


def main() -> None:
    """Run the command line. Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    try:
        build()(standalone_mode=True)
    except EdgewardError as error:
        errors.print(f"error: {error}", markup=False, style="red")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:  # a folder that cannot be written, a full disk
        if error.filename is None:
            raise
        errors.print(f"error: {error.filename}: {error.strerror}", markup=False, style="red")
        sys.exit(1)


if __name__ == "__main__":
    main()
