"""Why a request is not answered with a result, as the protocol says it."""

from __future__ import annotations

import math

from agent.runtime.port import BadInput, Overloaded
from agent.runtime.worker import DeadlineExceeded, WorkerStopped
from edgeward.errors import EdgewardError, RuntimeFault


class Refusal(EdgewardError):
    """An HTTP status and a sentence for whoever sent the request.

    `retry_after` seconds is when it may be worth trying again; None: the same request fails again.
    `allow` names the methods of a path that does not know the one that came.
    """

    def __init__(
        self, status: int, message: str, *, retry_after: float | None = None, allow: str = ""
    ) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = None if retry_after is None else max(1, math.ceil(retry_after))
        self.allow = allow


class NotFinite(Refusal):
    """The model gave NaN or infinity, which its slot's policy does not accept."""


def blames_model(error: EdgewardError) -> bool:
    """Whether an error of the engine speaks against the model, and not of the request, a queue or a stop."""
    return isinstance(error, RuntimeFault) and not isinstance(error, BadInput | WorkerStopped)


def bad(message: str) -> Refusal:
    return Refusal(400, message)


def from_engine(error: EdgewardError) -> Refusal:
    """What an error of the engine means to the client."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, Overloaded):
        return Refusal(429, str(error), retry_after=error.retry_after)
    if isinstance(error, BadInput):
        return bad(str(error))
    if isinstance(error, DeadlineExceeded):
        return Refusal(504, str(error))
    if isinstance(error, WorkerStopped):
        return Refusal(503, str(error), retry_after=1)
    return Refusal(500, str(error))
