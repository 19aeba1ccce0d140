"""A run as text: a line for each step, from which it can be done again bit for bit."""

from zoext.trajectory.fields import TrajectoryError
from zoext.trajectory.recording import Trajectory
from zoext.trajectory.replaying import replay

__all__ = ["Trajectory", "TrajectoryError", "replay"]
