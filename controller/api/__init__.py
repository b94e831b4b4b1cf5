"""The controller's HTTP interface (FastAPI)."""
