"""The step engine: estimates and updates, for every kind of executor."""
