"""A run in its folder: lock, settings, metrics, checkpoints, trajectory and final model."""
