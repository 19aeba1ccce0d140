"""The step engine: everything in a step that torch.optim.Optimizer does not define."""

from zoext._engine.applying import AppliedStep, GroupOptions, Recorder
from zoext._engine.axes import Axes, with_current_names
from zoext._engine.callers import check_not_skipping, check_not_trainer, initializes_state
from zoext._engine.context import StepContext, StepSeeds
from zoext._engine.deferral import check as check_deferring
from zoext._engine.deferral import check_groups, merge_all
from zoext._engine.engine import StepEngine
from zoext._engine.estimation import Closure
from zoext._engine.executor import StepExecutor
from zoext._engine.first_order import check_not_scaled
from zoext._engine.loss_watch import LossWatch
from zoext._engine.open_round import LoRAFactors, OpenRound

__all__ = [
    "AppliedStep",
    "Axes",
    "Closure",
    "GroupOptions",
    "LoRAFactors",
    "LossWatch",
    "OpenRound",
    "Recorder",
    "StepContext",
    "StepEngine",
    "StepExecutor",
    "StepSeeds",
    "check_deferring",
    "check_groups",
    "check_not_scaled",
    "check_not_skipping",
    "check_not_trainer",
    "initializes_state",
    "merge_all",
    "with_current_names",
]
