"""Rollout planning: pure decisions only."""
