"""The `edgeward` command."""
