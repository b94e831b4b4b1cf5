"""Where streams and local servers offer what a model answered, for whoever compares it with another's answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from agent.runtime.port import Arrays

#: Called on the shadow's thread when both have answered and do not agree.
Disagreed = Callable[[], None]


class Observer(Protocol):
    """Takes copies at once and never waits; any thread may ask."""

    def chosen(self, number: int) -> list[int]:
        """Which of `number` inferences, in their order, are sampled; empty while there is no room."""
        ...

    def offer(self, inputs: Arrays, outputs: Arrays, disagreed: Disagreed | None = None) -> None:
        """One sampled inference: the arrays that the acting model was given and what it answered, by tensor name."""
        ...


class Tap:
    """One for each running model. Whoever asks the model looks at `observer` after each answer: None costs
    that look."""

    __slots__ = ("observer",)

    def __init__(self) -> None:
        self.observer: Observer | None = None
