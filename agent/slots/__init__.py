"""Model slots: how a candidate is tried, what runs, and what of it stays on the disk."""
