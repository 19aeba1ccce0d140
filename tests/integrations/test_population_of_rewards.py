"""examples/population_of_rewards.py raises a reward of generated tokens with a population."""

from __future__ import annotations

import pytest
import transformers

from support.examples import run

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
transformers.utils.logging.disable_progress_bar()


def test_raises_the_reward() -> None:
    """Seeds 0 to 5 raised it from .39 to .69 to .78 to .89. With shuffled losses they end at .43 to .66."""
    before, after = run("population_of_rewards.py")["train"](seed=0)
    assert before < 0.5
    assert after > before + 0.2
