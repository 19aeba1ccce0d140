"""The posts and decisions of an elastic group, in a store that all members reach."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from zoext.distributed._decisions import Decision, Place, Post

if TYPE_CHECKING:  # a build of torch may lack it
    from torch.distributed import Store  # type: ignore[attr-defined]

#: Steps whose decisions are kept for members that come late.
HISTORY = 10_000
#: What no key of the store has as its value.
_NEVER = "never"
#: Seconds between two looks at the store: at first, and at most.
_SHORTEST, _LONGEST = 2e-4, 2e-2


class Ledger:
    """Reads and writes a store. The first decision that is proposed for a round is final."""

    def __init__(self, store: Store, name: str) -> None:
        self._store = store
        self._name = name
        self._announcements = 0  # by this process
        self._decided: deque[tuple[int, str]] = deque()
        self._posted: deque[tuple[int, str]] = deque()

    def claim(self, member: int) -> bool:
        """Takes the number of a member; returns False if a process had it before."""
        return bool(self._store.add(self._key(f"claim/{member}"), 1) == 1)

    def new_member(self, first: int) -> int:
        """A number that no member of the run has had, from ``first`` on."""
        return first + int(self._store.add(self._key("members"), 1)) - 1

    def announce(self, member: int) -> None:
        """Asks for a part in the estimates to come."""
        self._announcements += 1
        number, own = 1, f"{member} {self._announcements}"
        # In one operation, so that a process that dies here leaves no gap.
        while self._store.compare_set(self._key(f"announcement/{number}"), "", own) != own.encode():
            number += 1

    def announced(self, since: int) -> tuple[list[int], int]:
        """The members that asked after the first ``since``, and how many have."""
        members = []
        while (found := self._get(f"announcement/{since + 1}")) is not None:
            members.append(int(found.split()[0]))
            since += 1
        return members, since

    def post(self, place: Place, member: int, post: Post) -> None:
        """Writes what a member has, and forgets what it wrote two steps before."""
        key = self._post_key(place, member)
        self._store.set(key, post.encoded().decode())
        self._posted.append((place.step, key))
        while self._posted[0][0] < place.step - 1:
            self._store.delete_key(self._posted.popleft()[1])

    def posts(self, place: Place, members: Iterable[int]) -> dict[int, Post]:
        """Those that are there and can be read, in the order of ``members``."""
        found = {}
        for member in members:
            if (text := self._get(f"post/{place}/{member}")) is not None:
                with suppress(ValueError):
                    found[member] = Post.decoded(text)
        return found

    def is_complete(self, place: Place, members: Sequence[int]) -> bool:
        """Whether all members have posted."""
        return bool(self._store.check([self._post_key(place, member) for member in members]))

    def decision(self, place: Place) -> Decision | None:
        text = self._get(f"decision/{place}")
        return None if text is None else Decision.decoded(text)

    def propose(self, place: Place, decision: Decision) -> Decision:
        """Returns what is decided: this, or what another member proposed before."""
        key = self._key(f"decision/{place}")
        own = decision.encoded()
        decided = self._store.compare_set(key, "", own.decode())
        if decided == own:
            self._store.set(self._key("latest"), str(place.step))
        self._decided.append((place.step, key))
        while self._decided[0][0] < place.step - HISTORY:
            self._store.delete_key(self._decided.popleft()[1])
        return Decision.decoded(decided)

    def latest(self) -> int | None:
        """The step of the last decision; None if there is none."""
        text = self._get("latest")
        return None if text is None else int(text)

    def wait(self, is_over: Callable[[], bool], seconds: float) -> bool:
        """Waits until ``is_over()``; returns whether it was in time."""
        end, pause = time.monotonic() + seconds, _SHORTEST
        while not is_over():
            left = end - time.monotonic()
            if left <= 0:
                return False
            time.sleep(min(pause, left))
            pause = min(2 * pause, _LONGEST)
        return True

    def _get(self, name: str) -> bytes | None:
        """A value, or None if there is none; the store's own ``get`` would wait for it."""
        found = self._store.compare_set(self._key(name), _NEVER, _NEVER)
        return None if found == _NEVER.encode() else found

    def _post_key(self, place: Place, member: int) -> str:
        return self._key(f"post/{place}/{member}")

    def _key(self, name: str) -> str:
        return f"zoext/{self._name}/{name}"
