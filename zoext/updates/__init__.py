"""The axis Update: how do estimates move theta?"""

from zoext.updates.adam_replay import AdamReplay
from zoext.updates.base import LinearUpdate, Move, State, Update
from zoext.updates.scalar_adam import ScalarAdam
from zoext.updates.sgd import SGD
from zoext.updates.sign_replay import SignReplay

__all__ = ["SGD", "AdamReplay", "LinearUpdate", "Move", "ScalarAdam", "SignReplay", "State", "Update"]
