"""The update axis: how estimates move theta."""

from zoext.updates.adam_replay import AdamReplay
from zoext.updates.base import GroupStep, LinearUpdate, State, Update
from zoext.updates.scalar_adam import ScalarAdam
from zoext.updates.sgd import SGD
from zoext.updates.sign_replay import SignReplay

__all__ = ["SGD", "AdamReplay", "GroupStep", "LinearUpdate", "ScalarAdam", "SignReplay", "State", "Update"]
