"""Records runs as text, a line for each step, and replays them bit for bit.

``Trajectory`` records and ``replay`` replays; ``TrajectoryError`` and ``VersionError`` say why a file was
refused. The other names are for tools that read trajectories or write beside them, such as the command.
"""

from zoext.trajectory.fields import Fields, TrajectoryError, VersionError
from zoext.trajectory.header import NOISE_FIELD, Header
from zoext.trajectory.matching import remembers
from zoext.trajectory.owned import OwnedFile
from zoext.trajectory.reading import Part, last_whole_step, open_recording, read_until
from zoext.trajectory.recording import Trajectory
from zoext.trajectory.replaying import replay, replay_parts

__all__ = [
    "NOISE_FIELD",
    "Fields",
    "Header",
    "OwnedFile",
    "Part",
    "Trajectory",
    "TrajectoryError",
    "VersionError",
    "last_whole_step",
    "open_recording",
    "read_until",
    "remembers",
    "replay",
    "replay_parts",
]
