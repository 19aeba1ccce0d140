"""The parts of a batched probe: where the copies of a batch lie, their weights, and checks of both."""
