"""The problem that settings describe, ready to be learned."""

from __future__ import annotations

import torch

from zoext.cli import demo, problem
from zoext.cli.models import choose_trainable
from zoext.cli.problem import Problem
from zoext.cli.settings import Settings


def load(settings: Settings, device: torch.device) -> Problem:
    """Loads and checks model and data; the model is on ``device``, and what is to move requires grad."""
    loaded = demo.load(settings) if settings.is_demo else problem.load(settings)
    choose_trainable(loaded.model, settings.trainable)
    loaded.model.to(device)
    return loaded
