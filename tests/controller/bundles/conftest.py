"""A controller that devices are enrolled with, for what is then carried to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.controller.bundles.carrying import Offline


@pytest.fixture
def offline(plant: Any, tmp_path: Path, until: Any, make: Any) -> Offline:
    plant.releases.init(plant.client)
    plant.client.apply(
        [make("Site", "north"), make("Fleet", "line", matchLabels={"site": "north"}, streams=[])]
    )
    return Offline(plant, tmp_path, until)
