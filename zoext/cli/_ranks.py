"""The processes that run a command together, as ``torchrun -m zoext`` starts them.

Every rank runs the whole command: it reads the same files, takes part in every step, and comes to the same
results. Only the first one writes files and prints. An error is printed once, by a rank that it happened on,
and all ranks end with its exit code.
"""

from __future__ import annotations

import os
import sys
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import torch
from torch import Tensor, distributed

if TYPE_CHECKING:  # a build of torch may lack it
    from torch.distributed.distributed_c10d import Store

_T = TypeVar("_T")
_P = ParamSpec("_P")

#: A rank waits this long for the others: for the slowest to load the model, or for the first to write one.
_TIMEOUT = timedelta(minutes=30)
#: How long a rank that another one may have made fail waits for the error of that one, in seconds.
_CAUSE = 5.0
_POLL = 0.05

#: What ``--parallel`` divides over ranks: the examples of a batch, or the probes of a round.
DATA = "data"
PARALLELS = (DATA, "probes")


@dataclass(frozen=True)
class _Stores:
    """Texts that ranks exchange: during this attempt of a launch, or over its restarts."""

    attempt: Store
    launch: Store


@dataclass(frozen=True)
class Ranks:
    """This process among those that run the command.

    Attributes:
        number: of this process, from 0.
        count: of all processes.
        local: the number of this process among those of its machine, which is that of its GPU.
        launch: identifies the launch over all its restarts; None if nothing can restart it.
    """

    number: int = 0
    count: int = 1
    local: int = 0
    launch: str | None = None
    stores: _Stores | None = None

    @classmethod
    def of_environment(cls) -> Ranks:
        """The ranks that the variables of torchrun describe; one process without them."""
        variables = os.environ
        if not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= variables.keys():
            return cls()
        number, count = int(variables["RANK"]), int(variables["WORLD_SIZE"])
        if count == 1 and "TORCHELASTIC_RUN_ID" not in variables:
            return cls()
        # The agent of torchrun serves a store that outlives its workers; other launchers have none.
        is_server = number == 0 and variables.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        store = distributed.TCPStore(  # type: ignore[attr-defined]
            variables["MASTER_ADDR"],
            int(variables["MASTER_PORT"]),
            is_master=is_server,
            timeout=_TIMEOUT,
            wait_for_workers=False,
            multi_tenant=True,
        )
        attempt = variables.get("TORCHELASTIC_RESTART_COUNT", "0")
        stores = _Stores(_part(store, f"zoext/{attempt}"), _part(store, "zoext"))
        launch = stores.launch.compare_set("launch", "", uuid.uuid4().hex).decode()
        return cls(number, count, int(variables.get("LOCAL_RANK", number)), launch, stores)

    @property
    def is_first(self) -> bool:
        return self.number == 0

    # Beginning and end

    @contextmanager
    def printing_once(self) -> Iterator[None]:
        """A block in which only the first rank prints to stdout, and warns."""
        if self.is_first:
            yield
            return
        with (
            open(os.devnull, "w", encoding="utf-8") as nowhere,
            redirect_stdout(nowhere),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield

    @contextmanager
    def joined(self) -> Iterator[None]:
        """A block in which the ranks are the default process group."""
        if self.count == 1 or self.stores is None:
            yield
            return
        has_gpus = torch.cuda.is_available() and distributed.is_nccl_available()
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if has_gpus else "gloo",
            store=_part(self.stores.attempt, "group"),
            rank=self.number,
            world_size=self.count,
            timeout=_TIMEOUT,
        )
        yield
        distributed.destroy_process_group()  # not after an error: it may wait for ranks that are gone

    def fail(self, text: str, code: int) -> int:
        """Prints why the command ends, unless another rank has said so; returns the exit code of all."""
        where = text if self.is_first else f"rank {self.number}: {text}"
        first, its_code = self._claim_failure(code)
        if first:
            print(f"zoext: {where}", file=sys.stderr, flush=True)
            self._publish("reported")
        return its_code

    def code_after(self, error: Exception) -> int | None:
        """The exit code after an unexpected ``error``; None if its traceback is to be printed.

        Collectives raise a RuntimeError on the ranks that are left when one ends. It is not printed if that
        one says why.
        """
        if self.count == 1 or self.stores is None:
            return None
        if not isinstance(error, RuntimeError):
            self._claim_failure(1)
            return None
        until = time.monotonic() + _CAUSE
        while time.monotonic() < until:
            try:
                if self.stores.attempt.check(["failure"]):
                    return self._claim_failure(1)[1]
            except RuntimeError:  # the store was served by a rank that is gone
                return None
            time.sleep(_POLL)
        return None

    def _claim_failure(self, code: int) -> tuple[bool, int]:
        """Whether this rank is the first to fail, and the exit code of the first."""
        if self.count == 1 or self.stores is None:
            return True, code
        mine = f"{self.number} {code}"
        try:
            found = self.stores.attempt.compare_set("failure", "", mine).decode()
            if found != mine:
                # torchrun stops all ranks as soon as one has ended.
                self.stores.attempt.wait(["reported"], timedelta(seconds=_CAUSE))
        except RuntimeError:  # the store was served by a rank that is gone
            return True, code
        return found == mine, int(found.split()[1])

    def _publish(self, name: str, text: str = "-") -> None:
        if self.stores is not None:
            self.stores.attempt.set(name, text)

    # What the ranks tell each other

    def wait(self) -> None:
        """Returns when all ranks are here."""
        self.any(False)

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is true on any rank."""
        return self.largest(int(flag)) > 0

    def largest(self, number: int) -> int:
        """The largest ``number`` of all ranks."""
        if self.count == 1:
            return number
        found = torch.tensor(number)
        distributed.all_reduce(found, distributed.ReduceOp.MAX)
        return int(found)

    def sum(self, tensor: Tensor) -> Tensor:
        """Adds up ``tensor`` over all ranks, in place."""
        if self.count > 1:
            distributed.all_reduce(tensor)
        return tensor

    def first(self, act: Callable[_P, _T], *arguments: _P.args, **options: _P.kwargs) -> _T | None:
        """Calls ``act`` on the first rank only; None on the others."""
        return act(*arguments, **options) if self.is_first else None

    def shared(self, name: str, text: Callable[[], str]) -> str:
        """``text()`` of the first rank, on all of them; ``name`` is used once per command."""
        if self.is_first:
            value = text()
            self._publish(name, value)
            return value
        assert self.stores is not None
        while not self.stores.attempt.check([name]):
            if self.stores.attempt.check(["failure"]):
                raise RuntimeError("the first rank has ended")
            time.sleep(_POLL)
        return self.stores.attempt.get(name).decode()

    def keep(self, name: str, text: str) -> None:
        """Keeps a text for the restarts of this launch."""
        if self.stores is not None:
            self.stores.launch.set(name, text)

    def kept(self, name: str) -> str | None:
        """What an earlier attempt of this launch has kept."""
        if self.stores is None or not self.stores.launch.check([name]):
            return None
        return self.stores.launch.get(name).decode()

    # What is divided

    def share_of(self, items: Sequence[_T]) -> Sequence[_T]:
        """Every ``count``-th item: those of this rank."""
        return items[self.number :: self.count]

    def batch_parts(self, parallel: str) -> int:
        """The number of ranks that a batch is divided over."""
        return self.count if parallel == DATA else 1

    def optimizer_options(self, parallel: str) -> dict[str, Any]:
        """The process groups of an optimizer; the default averages losses over all ranks."""
        if self.count == 1 or parallel == DATA:
            return {}
        return {"probe_group": distributed.group.WORLD}


def _part(store: Store, name: str) -> Store:
    return distributed.PrefixStore(name, store)  # type: ignore[attr-defined]


#: A process that runs the command without others.
ALONE = Ranks()
