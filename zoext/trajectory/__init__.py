"""Records runs as text, one line per step, and replays them bit for bit.

``Trajectory`` records the steps of an optimizer, and ``replay`` applies them again to the weights that the
run began with. The other names are for programs that read a trajectory themselves or write files beside it,
as the ``zoext`` command does.
"""

from zoext.noise import NOISE_FIELD
from zoext.trajectory._format.fields import Fields, TrajectoryError, VersionError
from zoext.trajectory._format.header import Header, weights_digest
from zoext.trajectory._format.reading import Part, last_whole_step, open_recording, read_until
from zoext.trajectory._optimizers import remembers
from zoext.trajectory._replay.following import Follower
from zoext.trajectory._replay.replaying import replay, replay_parts
from zoext.trajectory._writer.owned_file import OwnedFile
from zoext.trajectory._writer.recording import Trajectory

__all__ = [
    "NOISE_FIELD",
    "Fields",
    "Follower",
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
    "weights_digest",
]
