"""``round.adapter(i)`` is probe i as a LoRA adapter of PEFT."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import zoext

transformers = pytest.importorskip("transformers", reason="needs transformers for Conv1D")
from transformers.pytorch_utils import Conv1D  # noqa: E402


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.table = nn.Embedding(11, 6)
        self.up = nn.Linear(6, 9)
        self.turned = Conv1D(7, 9)
        self.down = nn.Linear(7, 3)
        nn.init.normal_(self.turned.weight)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name.endswith("weight"))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.down(self.turned(self.up(self.table(tokens)).tanh()).tanh())


TOKENS = torch.tensor([[1, 5, 3], [7, 0, 10]])
RECIPES: dict[str, Callable[[nn.Module], zoext.ZerothOrderOptimizer]] = {
    "lozo": lambda model: zoext.LOZO(model, rank=2, mu=0.3, seed=4),
    "lozo gv": lambda model: zoext.ZerothOrderOptimizer(
        model, direction=zoext.LowRank(rank=2), estimator=zoext.GuidingVector(pool_size=3), mu=0.3
    ),
    "agzo": lambda model: zoext.AGZO(model, rank=2, mu=0.3, seed=4),
}


def loss_of(model: nn.Module) -> Tensor:
    return model(TOKENS).square().mean()


def rounds_of(recipe: str, model: nn.Module) -> list[tuple[dict[str, zoext.LoRAFactors], Tensor]]:
    """Adapter and loss of every probe of an estimate."""
    optimizer, found = RECIPES[recipe](model), []
    round: zoext.OpenRound | None = optimizer.ask()
    while round is not None:
        losses = []
        for index in range(len(round)):
            with round.displaced(index):
                losses.append(loss_of(model))
            found.append((round.adapter(index), losses[-1]))
        round = optimizer.tell(losses)
    return found


@pytest.mark.parametrize("recipe", RECIPES)
def test_added_to_the_weights(recipe: str) -> None:
    model = Net()
    if recipe == "agzo":
        model.table.requires_grad_(False)  # no linear layer: its direction is dense
    for adapter, loss in rounds_of(recipe, model):
        moved = Net()
        for name, (down, up) in adapter.items():
            delta = up @ down
            weight = moved.get_parameter(name)
            weight.data += delta.T if "table" in name or "turned" in name else delta
        moving = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert adapter.keys() in (moving, set())
        assert torch.allclose(loss_of(moved), loss, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("recipe", RECIPES)
def test_loaded_by_peft(recipe: str) -> None:
    peft = pytest.importorskip("peft", reason="needs PEFT")
    model = Net()
    model.table.requires_grad_(False)
    for adapter, loss in rounds_of(recipe, model):
        if not adapter:  # at theta
            continue
        rank = len(next(iter(adapter.values())).A)
        config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=["up", "turned", "down"])
        wrapped = peft.get_peft_model(Net(), config)
        state = {}
        for name, (down, up) in adapter.items():
            module = name.removesuffix(".weight")
            state[f"base_model.model.{module}.lora_A.weight"] = down
            state[f"base_model.model.{module}.lora_B.weight"] = up
        loaded = peft.set_peft_model_state_dict(wrapped, state)
        assert not loaded.unexpected_keys
        assert torch.allclose(loss_of(wrapped.eval()), loss, rtol=1e-5)


def test_a_convolution() -> None:
    torch.manual_seed(0)
    model = nn.Conv2d(3, 4, 2, bias=False)
    optimizer = zoext.LOZO(model, rank=2, mu=0.5)
    round, x = optimizer.ask(), torch.randn(1, 3, 5, 5)
    down, up = round.adapter(0)["weight"]
    assert down.shape == (2, 3, 2, 2)
    assert up.shape == (4, 2, 1, 1)
    with round.displaced(0):
        expected = model(x)
    through = nn.functional.conv2d(nn.functional.conv2d(x, down), up)
    assert torch.allclose(model(x) + through, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("optimizer", [zoext.MeZO, zoext.LOZO])
def test_dense_directions_are_refused(optimizer: Callable[..., zoext.ZerothOrderOptimizer]) -> None:
    round = optimizer(nn.Linear(4, 3)).ask()
    with pytest.raises(ValueError, match=r"direction: (Gaussian has no factors; use|bias has dense)"):
        round.adapter(0)


def test_parameters_without_their_module_are_refused() -> None:
    round = zoext.LOZO([nn.Linear(4, 3).weight]).ask()
    with pytest.raises(ValueError, match="adapter: whether a weight is stored transposed depends"):
        round.adapter(0)


def test_agzo_before_its_forward() -> None:
    round = zoext.AGZO(nn.Linear(4, 3, bias=False)).ask()
    with pytest.raises(RuntimeError, match=r"adapter: ActivationSubspace.*displaced\(0\)"):
        round.adapter(0)
