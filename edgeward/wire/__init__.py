"""The wire contract: every shape that crosses a process border, declared once.

HISTORY.md beside this file numbers the changes. A receiver ignores fields it does not know in
messages from a newer peer; documents written by people (`resources.py`) refuse unknown fields.
"""

PROTOCOL_VERSION = 1
API_VERSION = "edgeward.dev/v1alpha1"
