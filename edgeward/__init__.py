"""Edgeward: the wire contract, the Python client and the command line."""

__version__ = "0.1.0"
