"""The processes that take the steps of a run together.

``process_group=`` of an optimizer takes a ``torch.distributed`` group, whose ranks go in step, or an
``ElasticGroup``, whose members may be slow, fail and join.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from zoext.distributed._elastic import ElasticGroup, ElasticRanks
from zoext.distributed._ranks import Ranks
from zoext.distributed._sharing import EstimateRestart, Losses, Share, Sharing

if TYPE_CHECKING:  # a build of torch may lack them
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

__all__ = [
    "ElasticGroup",
    "ElasticRanks",
    "EstimateRestart",
    "Losses",
    "Ranks",
    "Share",
    "Sharing",
    "sharing_of",
]


def sharing_of(
    process_group: ProcessGroup | DeviceMesh | ElasticGroup | str | None, probe_group: ProcessGroup | None
) -> Sharing:
    """How the processes that the arguments of an optimizer name share its steps."""
    if not isinstance(process_group, ElasticGroup):
        return Ranks(process_group, probe_group)
    if probe_group is not None:
        raise ValueError(
            "probe_group: process_group is an ElasticGroup; pass shares='probes' to that instead"
        )
    return ElasticRanks(process_group)
