"""The Python client (SDK) of the controller's API and of a trend store's."""

from edgeward.client.controller import ControllerClient
from edgeward.client.trends import TrendClient

__all__ = ["ControllerClient", "TrendClient"]
