"""Every file that users copy from can be applied as it is, and so can the documents in docs/streams.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from edgeward.documents import load_yaml
from edgeward.manifests import read_resources
from edgeward.wire.resources import parse_resource

ROOT = Path(__file__).parents[1]


#: `training` holds what `edgeward train` reads.
FOLDERS = {path.name for path in (ROOT / "fleet_configs").iterdir()} - {"training"}


@pytest.mark.parametrize("folder", sorted(FOLDERS))
def test_a_folder_of_examples_is_valid(folder: str) -> None:
    assert read_resources([ROOT / "fleet_configs" / folder])


def test_the_stream_in_the_documentation_is_valid() -> None:
    (text,) = re.findall(
        r"^```yaml\n(apiVersion.*?)^```", (ROOT / "docs/streams.md").read_text(), re.M | re.S
    )
    (document,) = load_yaml(text, "docs/streams.md")
    assert parse_resource(document, source="docs/streams.md").kind == "Stream"
