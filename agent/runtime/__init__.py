"""Inference runtimes behind one port, each in a worker process."""
