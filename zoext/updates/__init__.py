"""The axis Update: how do estimates move theta?"""

from zoext.updates.adam_replay import AdamReplay
from zoext.updates.base import LinearUpdate, Move, State, Update
from zoext.updates.sgd import SGD

__all__ = ["SGD", "AdamReplay", "LinearUpdate", "Move", "State", "Update"]
