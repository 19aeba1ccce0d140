"""Losses that are computed elsewhere give the bits of ``step(closure)``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zoext
from support.graphed_runs import RECIPES, same
from zoext.estimators import assemble

both_probes = pytest.mark.parametrize("probe", ["streamed", "inplace"])


def model_of(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 7), nn.Dropout(0.3), nn.Tanh(), nn.Linear(7, 3)).to(dtype)


def loss_of(model: nn.Module, number: int) -> Tensor:
    dtype = next(model.parameters()).dtype
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(number)).to(dtype)
    return model(x).float().square().mean()


def losses_of(round: zoext.OpenRound, model: nn.Module, number: int) -> list[Tensor]:
    losses = []
    for index in range(len(round)):
        with round.displaced(index):
            losses.append(loss_of(model, number))
    return losses


def told(optimizer: zoext.ZerothOrderOptimizer, model: nn.Module, number: int) -> Tensor:
    """A step by ask and tell."""
    round: zoext.OpenRound | None = optimizer.ask()
    while round is not None:
        assert round.coefficients.shape == (len(round), len(round.seeds))
        round = optimizer.tell(losses_of(round, model, number))
    return optimizer.step()


def run(step: Callable[..., Tensor], recipe: str, dtype: torch.dtype, precision: str) -> Any:
    torch.manual_seed(11)  # dropout draws from the global generator
    model = model_of(dtype)
    optimizer = RECIPES[recipe](model, lr=1e-2, mu=1e-2, weight_decay=0.1, seed=5, precision=precision)
    losses = [step(optimizer, model, number) for number in range(3)]
    return [model.state_dict(), optimizer.state_dict(), losses, torch.get_rng_state()]


def by_closure(optimizer: zoext.ZerothOrderOptimizer, model: nn.Module, number: int) -> Tensor:
    return optimizer.step(lambda: loss_of(model, number))


@pytest.mark.parametrize(
    ("dtype", "precision"),
    [(torch.float32, "nearest"), (torch.bfloat16, "stochastic"), (torch.float16, "residual")],
)
@pytest.mark.parametrize("recipe", RECIPES)
def test_bits_of_a_step(recipe: str, dtype: torch.dtype, precision: str) -> None:
    assert same(run(told, recipe, dtype, precision), run(by_closure, recipe, dtype, precision))


@pytest.mark.parametrize("recipe", ["mezo", "agzo", "gv"])
def test_micro_batches(recipe: str) -> None:
    """Rounds and closures mix, and a step takes the mean of them all."""

    def mixed(optimizer: zoext.ZerothOrderOptimizer, model: nn.Module, number: int) -> Tensor:
        optimizer.estimate(lambda: loss_of(model, number))
        return told(optimizer, model, number + 10)

    def closures(optimizer: zoext.ZerothOrderOptimizer, model: nn.Module, number: int) -> Tensor:
        for batch in (number, number + 10):
            optimizer.estimate(lambda batch=batch: loss_of(model, batch))
        return optimizer.step()

    assert same(*(run(step, recipe, torch.float32, "nearest") for step in (mixed, closures)))


def test_probes_in_any_order() -> None:
    model = model_of().eval()
    optimizer = zoext.MeZO(model, samples=3, mu=0.1)
    forwards = [optimizer.ask()]
    losses = losses_of(forwards[0], model, 0)
    again = {}
    for index in (4, 0, 5, 2, 1, 3):
        with forwards[0].displaced(index):
            again[index] = loss_of(model, 0)
    assert [again[index] for index in range(6)] == losses


@both_probes
def test_what_a_round_says_is_what_it_does(probe: str) -> None:
    model = model_of(torch.float64).eval()
    before = [parameter.clone() for parameter in model.parameters()]
    optimizer = zoext.MeZOGV(model, pool_size=3, elite_ratio=0.4, mu=0.25, probe=probe)
    round = optimizer.tell(losses_of(optimizer.ask(), model, 0))
    assert round is not None
    seeds = [seed % 2**64 for seed in round.seeds.tolist()]
    plain = model_of(torch.float64).eval()
    for row, coefficients in enumerate(round.coefficients.tolist()):
        for key, (parameter, base) in enumerate(zip(plain.parameters(), before, strict=True)):
            noise = [
                zoext.noise.normal(base.shape, seed=seed, key=key, dtype=torch.float64) for seed in seeds
            ]
            moved = sum(c * z for c, z in zip(coefficients, noise, strict=True))
            parameter.data = base + 0.25 * moved
        with round.displaced(row):
            assert torch.allclose(loss_of(model, 1), loss_of(plain, 1), rtol=1e-6)
    for parameter, base in zip(model.parameters(), before, strict=True):
        assert torch.allclose(parameter, base, rtol=0, atol=0 if probe == "streamed" else 1e-14)


@pytest.mark.parametrize("kind", ["floats", "tensor"])
def test_losses_in_the_dtype_of_the_closure(kind: str) -> None:
    """Floats are as those of a closure that returns floats, a float32 tensor as those of float32 losses."""
    ends = []
    for ask in (True, False):
        model = model_of().eval()
        optimizer = zoext.MeZO(model, lr=1e-2, mu=1e-3)
        for number in range(8):
            if ask:
                losses = [float(loss) for loss in losses_of(optimizer.ask(), model, number)]
                optimizer.tell(losses if kind == "floats" else torch.tensor(losses))
                optimizer.step()
            else:
                optimizer.step(
                    lambda model=model, number=number: (
                        loss_of(model, number).item() if kind == "floats" else loss_of(model, number)
                    )
                )
        ends.append(list(model.parameters()))
    assert all(map(torch.equal, *ends))


def test_numbers_that_are_drawn_between_ask_and_the_first_probe() -> None:
    """Such as those of a shuffled batch: all probes still see the same dropout."""
    torch.manual_seed(1)
    model = model_of()
    round = zoext.MeZO(model, samples=2, mu=1e-30).ask()
    torch.rand(3)
    losses = losses_of(round, model, 0)
    assert losses == losses[:1] * 4


def test_a_forward_of_agzo_that_raised_leaves_nothing_of_its_basis() -> None:
    ends = []
    for fails in (True, False):
        torch.manual_seed(1)
        model = model_of().eval()
        optimizer = zoext.AGZO(model, lr=0.1, mu=0.1)
        round: zoext.OpenRound | None = optimizer.ask()
        assert round is not None
        if fails:
            with pytest.raises(ZeroDivisionError), round.displaced(0):
                raise ZeroDivisionError(loss_of(model, 7))
        while round is not None:
            round = optimizer.tell(losses_of(round, model, 0))
        optimizer.step()
        ends.append(list(model.parameters()))
    assert all(map(torch.equal, *ends))


def test_an_estimator_whose_first_round_is_at_theta() -> None:
    class OneSided(zoext.Estimator):
        draws = 1

        def rounds(self, seeds: Tensor, mu: float) -> Any:
            (centre,) = yield zoext.Round.at_centre(seeds)
            (loss,) = yield zoext.Round.along_each(seeds)
            return assemble(seeds, ((loss - centre) / mu).unsqueeze(0), [loss], centre)

    frozen = dataclass(frozen=True)(OneSided)
    ends = []
    for estimator in (frozen(), zoext.ForwardDifference()):
        model = model_of().eval()
        direction = zoext.ActivationSubspace()
        optimizer = zoext.ZerothOrderOptimizer(model, direction=direction, estimator=estimator, lr=0.1)
        optimizer.step(lambda model=model: loss_of(model, 0))
        ends.append(list(model.parameters()))
    assert all(map(torch.equal, *ends))


@both_probes
def test_theta_is_back_after_a_block_that_raises(probe: str) -> None:
    model = model_of(torch.float64)
    before = [parameter.clone() for parameter in model.parameters()]
    round = zoext.MeZO(model, mu=0.5, probe=probe).ask()
    with pytest.raises(ZeroDivisionError), round.displaced(0):
        raise ZeroDivisionError
    with round.displaced(1):
        loss_of(model, 1)
    for parameter, base in zip(model.parameters(), before, strict=True):
        assert torch.allclose(parameter, base, rtol=0, atol=0 if probe == "streamed" else 1e-14)


class TestWhatIsRefused:
    def setup_method(self) -> None:
        self.model = model_of()
        self.optimizer = zoext.MeZOGreedy(self.model, pool_size=2, lr=0.1)

    def test_tell_before_ask(self) -> None:
        with pytest.raises(RuntimeError, match=r"without an open round; call ask\(\) first"):
            self.optimizer.tell([1.0, 2.0])

    @pytest.mark.parametrize(
        "losses", [[1.0], [1.0, 2.0, 3.0], torch.ones(1), torch.ones(2, 1), torch.ones(())]
    )
    def test_another_number_of_losses(self, losses: Any) -> None:
        self.optimizer.ask()
        with pytest.raises(ValueError, match="losses must be one for each of the 2 probes"):
            self.optimizer.tell(losses)
        assert len(self.optimizer.tell([1.0, 2.0])) == 1  # type: ignore[arg-type]

    @pytest.mark.parametrize("losses", [0.5, None, "ab", {0: 1.0, 1: 2.0}])
    def test_no_losses_at_all(self, losses: Any) -> None:
        self.optimizer.ask()
        with pytest.raises(TypeError, match=r"losses must be a tensor \[2\] or a list of numbers"):
            self.optimizer.tell(losses)

    @pytest.mark.parametrize("losses", [[1.0, [2.0]], ["a", 1.0], [1.0, 1j]])
    def test_losses_that_are_no_numbers(self, losses: Any) -> None:
        self.optimizer.ask()
        with pytest.raises(TypeError, match="losses: each must be"):
            self.optimizer.tell(losses)

    @pytest.mark.parametrize("change", ["mu", "frozen", "moved"])
    def test_a_changed_optimizer(self, change: str) -> None:
        self.optimizer.ask()
        if change == "mu":
            self.optimizer.param_groups[0]["mu"] = 0.5
        elif change == "frozen":
            self.model[0].weight.requires_grad_(False)
        else:
            self.model[0].weight.data = self.model[0].weight.data.clone()
        with pytest.raises(RuntimeError, match=r"changed since ask\(\).*call ask\(\) again"):
            self.optimizer.tell([1.0, 2.0])
        assert len(self.optimizer.ask()) == 2

    def test_a_step_while_a_round_is_open(self) -> None:
        before = [parameter.clone() for parameter in self.model.parameters()]
        self.optimizer.ask()
        for call in (
            self.optimizer.step,
            self.optimizer.ask,
            lambda: self.optimizer.step(lambda: loss_of(self.model, 0)),
            lambda: self.optimizer.estimate(lambda: loss_of(self.model, 0)),
        ):
            with pytest.raises(RuntimeError, match=r"a round is open: pass its losses to tell\(\)"):
                call()
        assert all(map(torch.equal, self.model.parameters(), before))
        self.optimizer.cancel()
        assert self.optimizer.estimate(lambda: loss_of(self.model, 0)).finite

    def test_a_round_that_is_over(self) -> None:
        other = self.optimizer.ask()
        self.optimizer.cancel()
        with pytest.raises(RuntimeError, match="this round is over"):
            other.displaced(0).__enter__()
        round = self.optimizer.ask()
        self.optimizer.tell([1.0, 2.0])
        for call in (lambda: round.displaced(0).__enter__(), lambda: round.adapter(0)):
            with pytest.raises(RuntimeError, match=r"use the round that tell\(\) returned"):
                call()

    @pytest.mark.parametrize("index", [2, -1, True, 0.0])
    def test_a_probe_that_there_is_not(self, index: Any) -> None:
        with (
            pytest.raises(IndexError, match=r"index must be in 0 \.\. 1"),
            self.optimizer.ask().displaced(index),
        ):
            pass

    def test_calls_of_the_optimizer_within_a_block(self) -> None:
        self.optimizer.estimate(lambda: loss_of(self.model, 0))
        round = self.optimizer.ask()
        for call in (lambda: self.optimizer.tell([1.0, 2.0]), self.optimizer.step):
            with pytest.raises(RuntimeError, match="within displaced"), round.displaced(0):
                call()
        assert len(self.optimizer.tell([1.0, 2.0])) == 1  # type: ignore[arg-type]

    def test_ask_within_a_closure(self) -> None:
        with pytest.raises(RuntimeError, match="by its own closure"):
            self.optimizer.step(lambda: self.optimizer.ask())  # type: ignore[arg-type, return-value]
        assert len(self.optimizer.ask()) == 2

    def test_blocks_in_one_another(self) -> None:
        round = self.optimizer.ask()
        with (
            pytest.raises(RuntimeError, match="own closure, or within displaced"),
            round.displaced(0),
            round.displaced(1),
        ):
            pass

    def test_losses_that_are_not_finite(self) -> None:
        self.optimizer.estimate(lambda: loss_of(self.model, 0))
        self.optimizer.ask()
        self.optimizer.tell([1.0, 2.0])
        with pytest.raises(FloatingPointError, match="was not finite"):
            self.optimizer.tell([float("nan")])
        with pytest.raises(RuntimeError, match="nothing to apply"):  # as after an estimate that raised
            self.optimizer.step()
        assert len(self.optimizer.ask()) == 2

    def test_agzo_without_its_forward(self) -> None:
        optimizer = zoext.AGZO(self.model)
        round = optimizer.ask()
        assert round.coefficients.tolist() == [[0.0]]
        with pytest.raises(RuntimeError, match=r"tell: ActivationSubspace.*displaced\(0\)"):
            optimizer.tell([1.0])
        with round.displaced(0):
            loss = loss_of(self.model, 0)
        assert optimizer.tell([loss]).coefficients.tolist() == [[1.0]]  # type: ignore[union-attr]
