"""The process groups of a run, as the arguments of an optimizer give them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch.distributed as dist

if TYPE_CHECKING:  # a build of torch may lack them
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

#: The dimensions of a mesh: ranks that have other batches, and ranks that evaluate other probes.
DIMENSIONS = ("data", "probe")


class Groups(NamedTuple):
    """The groups of this rank.

    Attributes:
        data: the ranks with other batches; "auto" for the default process group, if there is one when a step
            begins; None if there are none.
        probes: the ranks with the same batch, over which probes are dealt out; None if there are none.
    """

    data: ProcessGroup | str | None
    probes: ProcessGroup | None


def groups_of(
    process_group: ProcessGroup | DeviceMesh | str | None, probe_group: ProcessGroup | None
) -> Groups:
    """Checks the arguments, and finds the groups of a mesh by the names of its dimensions.

    Raises:
        TypeError: for groups of another kind.
        ValueError: for groups that this rank is not in, for a mesh with other dimensions, and if it is not
            clear which ranks have other batches.
    """
    if dist.is_available() and isinstance(process_group, dist.device_mesh.DeviceMesh):
        if probe_group is not None:
            raise ValueError("probe_group: process_group is a mesh; name one of its dimensions 'probe'")
        return _of_mesh(process_group)
    if process_group != "auto":
        _check("process_group", process_group, "'auto', None, a ProcessGroup or a DeviceMesh")
    _check("probe_group", probe_group, "None or a ProcessGroup")
    is_part = probe_group is not None and dist.get_world_size(probe_group) < dist.get_world_size()
    if is_part and process_group == "auto":
        raise ValueError(
            "process_group: it must be given if the ranks of probe_group are not all ranks; pass the group "
            "of the ranks with other batches, None if there are none, or a DeviceMesh with both dimensions"
        )
    return Groups(process_group, probe_group)  # type: ignore[arg-type]


def _of_mesh(mesh: DeviceMesh) -> Groups:
    names = mesh.mesh_dim_names or ()
    if not names or not set(names) <= set(DIMENSIONS):
        raise ValueError(
            f"process_group: the dimensions of the mesh must be named 'data' and 'probe', not {names}; pass "
            "mesh_dim_names to init_device_mesh, or a part of the mesh, as in mesh['data', 'probe']"
        )
    if mesh.get_coordinate() is None:
        raise ValueError("process_group: this rank is not in the mesh; pass a mesh of all ranks that train")
    data, probes = (mesh.get_group(name) if name in names else None for name in DIMENSIONS)
    return Groups(data, probes)


def _check(name: str, group: object, kinds: str) -> None:
    if group is None:
        return
    if dist.is_available() and group == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(f"{name}: this rank is not one of its ranks; pass the group that it is in")
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"{name} must be {kinds}, not {group!r}")
