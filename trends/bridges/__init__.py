"""Bridges: what the trend store has stored, handed on to other systems."""
