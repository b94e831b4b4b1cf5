"""The Python client (SDK) of the controller's API."""

from edgeward.client.controller import ControllerClient

__all__ = ["ControllerClient"]
