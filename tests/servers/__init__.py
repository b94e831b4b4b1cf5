"""Real servers for tests, each a process of its own with ports of its own."""
