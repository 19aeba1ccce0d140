"""Replaying: checks that a trajectory fits the weights, then applies its steps."""
