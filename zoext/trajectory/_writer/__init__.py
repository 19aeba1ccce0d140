"""Recording: appends the steps of an optimizer to a trajectory in the background."""
