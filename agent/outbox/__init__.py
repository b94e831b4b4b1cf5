"""What waits on a device for the trend store: durable, within budgets, and never lost without a record."""
