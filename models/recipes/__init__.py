"""The recipes: one module each, registered here."""

from __future__ import annotations

from edgeward.errors import InvalidDocument
from models.recipes.anomaly_autoencoder import AnomalyAutoencoder
from models.recipes.anomaly_detection import AnomalyDetection
from models.recipes.base import Recipe

RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in (AnomalyDetection(), AnomalyAutoencoder())}


def find(name: str) -> Recipe:
    """Raises InvalidDocument naming the known recipes."""
    if name not in RECIPES:
        raise InvalidDocument(f"unknown recipe {name!r}", field="recipe", hint=f"one of {', '.join(RECIPES)}")
    return RECIPES[name]
