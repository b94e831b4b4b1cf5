"""The README's commands are ones that the command line has."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer.main

from edgeward.cli.main import build

ROOT = Path(__file__).parents[1]
COMMANDS = [
    line.split(" #")[0].removeprefix("# ").removesuffix("&").partition(">")[0].strip()
    for line in re.findall(r"^(?:# )?edgeward .*$", (ROOT / "README.md").read_text(), re.MULTILINE)
]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_readme_has_these_options(command: str) -> None:
    words = shlex.split(command)[1:]
    found: Any = typer.main.get_command(build())
    while hasattr(found, "commands"):
        assert words[0] in found.commands, command
        found = found.commands[words.pop(0)]
    known = {option for parameter in found.params for option in parameter.opts}
    assert {word for word in words if word.startswith("-")} <= known
    required = [
        parameter.opts
        for parameter in found.params
        if parameter.required and parameter.opts[0].startswith("-")
    ]
    assert all(set(options) & set(words) for options in required)


def test_documents_that_are_named_exist() -> None:
    for document in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
            if "://" not in target:
                assert (document.parent / target).exists(), f"{document}: {target}"
    for source in ROOT.glob("[a-z]*/**/*.py"):
        for name in re.findall(r"\bdocs/[\w/.-]+\.md\b", source.read_text()):
            assert (ROOT / name).exists(), f"{source}: {name}"
