"""The problem that a run solves: a model, its data and its objective, built from the settings."""

from __future__ import annotations

import torch

from zoext.cli._problem import demo, problem
from zoext.cli._problem.models import choose_trainable
from zoext.cli._problem.problem import Problem
from zoext.cli._settings import Settings


def load(settings: Settings, device: torch.device) -> Problem:
    """Loads and checks model and data, moves the model to ``device`` and selects the trainable parameters."""
    settings.check_adapters()
    loaded = demo.load(settings) if settings.is_demo else problem.load(settings)
    choose_trainable(loaded.model, settings.trainable)
    loaded.model.to(device)
    return loaded
