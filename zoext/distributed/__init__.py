"""The processes that take the steps of a run together."""

from zoext.distributed._ranks import Ranks

__all__ = ["Ranks"]
