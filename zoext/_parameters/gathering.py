"""The groups of parameters that FSDP2 gathers together; all that zoext uses of its internals.

torch has no public hook that runs when FSDP2 reads the shards of a parameter: it does so before a forward
and before a backward, when it prefetches, and when ``unshard`` is called.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_OF_GROUP = (
    "_all_gather_result",
    "_to_sharded",
    "comm_ctx",
    "fsdp_params",
    "is_sharded",
    "unshard_in_backward",
)


class Shard:
    """This rank's shard of a parameter."""

    def __init__(self, record: Any) -> None:
        self._record = record

    @property
    def parameter(self) -> Tensor:
        """The parameter, as modules have it while it is not gathered: a DTensor."""
        parameter: Tensor = self._record.sharded_param
        return parameter

    @property
    def gathered(self) -> Tensor:
        """What this rank contributes when the parameter is gathered: its part as a vector, then padding."""
        vector: Tensor = self._record._sharded_param_data
        return vector

    @gathered.setter
    def gathered(self, vector: Tensor) -> None:
        self._record._sharded_param_data = vector


#: Returns the block in which a group is gathered from other shards; None if its own are to be gathered.
Displace = Callable[["GatherGroup"], AbstractContextManager[None] | None]


class GatherGroup:
    """Parameters that are gathered together."""

    def __init__(self, group: Any) -> None:
        if missing := [name for name in _OF_GROUP if not hasattr(group, name)]:
            raise RuntimeError(
                f"torch {torch.__version__} gathers sharded parameters in a way that zoext does not know: "
                f"{type(group).__name__} has no {', '.join(missing)}; use torch 2.11 to 2.14"
            )
        self._group = group
        self.shards = [Shard(record) for record in group.fsdp_params]

    @contextmanager
    def intercepted(self, displace: Displace) -> Iterator[None]:
        """A block in which ``displace`` is called whenever the shards are about to be read."""
        unshard, before = self._group.unshard, vars(self._group).get("unshard")

        def intercept(async_op: bool = False) -> None:
            block = displace(self) if self._reads_shards() else None
            if block is None:
                unshard(async_op)
                return
            with block:
                self._gather(unshard, async_op)

        self._group.unshard = intercept
        try:
            yield
        finally:
            if before is None:
                del self._group.unshard
            else:
                self._group.unshard = before

    def _reads_shards(self) -> bool:
        """Whether ``unshard`` would read the shards now, rather than find the parameters gathered."""
        group = self._group
        rests = not group.unshard_in_backward and group._training_state.name == "PRE_BACKWARD"
        return bool(group.is_sharded and group._all_gather_result is None and not rests)

    def _gather(self, unshard: Callable[[bool], None], async_op: bool) -> None:
        """Gathers the parameters, whose shards have been read when this returns."""
        group = self._group
        reads, _ = group.comm_ctx.get_all_gather_streams(async_op, group._training_state)
        reads.wait_stream(group.device_handle.current_stream())
        unshard(async_op)
        group.wait_for_unshard()

    def free(self) -> None:
        """Frees gathered parameters, also of a forward that raised, in which FSDP2's ``reshard`` does not."""
        self._group.wait_for_unshard()
        self._group._to_sharded()


def groups_of(modules: Iterable[nn.Module]) -> list[GatherGroup]:
    """The groups of those modules to which ``fully_shard`` was applied."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return []
    groups: dict[int, Any] = {}
    for module in modules:
        if isinstance(module, fsdp.FSDPModule):
            state: Any = module._get_fsdp_state()
            several = getattr(state, "_fsdp_param_groups", None)  # until torch 2.11 there is at most one
            for group in (state._fsdp_param_group,) if several is None else several:
                if group is not None:
                    groups[id(group)] = group
    return [GatherGroup(group) for group in groups.values()]


def reshard(module: nn.Module) -> None:
    """Makes FSDP2 free the weights it gathered for a forward: updates do not reach these copies."""
    for group in groups_of(module.modules()):
        group.free()
