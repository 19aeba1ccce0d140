"""Divides the parameters of a model over ranks, and puts them together again."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from zoext._parameters import shards
from zoext.cli._ranks import Ranks


@torch.no_grad()
def shard(model: nn.Module, device: torch.device, count: int) -> None:
    """Replaces each parameter of ``model`` by the rows of this rank, a DTensor on ``device``.

    All ``count`` ranks must have loaded the same weights, which are not sent. Buffers stay as they are.
    """
    # Imported late, because that takes seconds.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh(device.type, (count,))

    def part_of(parameter: Tensor) -> Tensor:
        placement = Shard(0) if parameter.dim() else Replicate()
        part = distribute_tensor(parameter.detach(), mesh, [placement], src_data_rank=None)
        # A part may be a view of the whole parameter, whose memory is to be freed.
        local = part.to_local().clone()
        return DTensor.from_local(
            local, mesh, [placement], run_check=False, shape=part.shape, stride=part.stride()
        )

    _replace_parameters(model, part_of)


@torch.no_grad()
def gather(model: nn.Module, ranks: Ranks) -> None:
    """Replaces each sharded parameter by the whole one, in host memory, on the first rank.

    The other ranks take part and keep none. One parameter at a time is on the device of each rank.
    """

    def whole_of(parameter: Tensor) -> Tensor:
        whole = shards.whole(parameter)
        return whole.cpu() if ranks.is_first else torch.empty(0, dtype=whole.dtype)

    if ranks.count > 1:
        _replace_parameters(model, whole_of)


def _replace_parameters(model: nn.Module, of: Callable[[Tensor], Tensor]) -> None:
    """Replaces each parameter, and all names of a tied one alike."""
    new: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter not in new:
                new[parameter] = nn.Parameter(of(parameter), requires_grad=parameter.requires_grad)
            setattr(module, name, new[parameter])
