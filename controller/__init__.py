"""The fleet controller: registry, rollouts, signed desired state and the API."""
