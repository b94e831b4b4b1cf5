"""The edge daemon: sync, fetch, verify, self-test, infer, act, buffer, report."""
