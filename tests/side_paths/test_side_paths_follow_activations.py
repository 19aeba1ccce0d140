"""With a closure, A is a basis of the leading inputs of each layer, without those at padding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import zoext
from support.oracle import bits
from support.side_paths import X, loss, losses, model

MASK = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]])


def leading(rows: Tensor, rank: int) -> Tensor:
    return torch.linalg.svd(rows.double(), full_matrices=False)[2][:rank]


def test_the_basis_is_that_of_the_inputs() -> None:
    built, runs = model(), []
    inputs: dict[str, Tensor] = {}
    for name in ("first", "packed", "head"):
        built.get_submodule(name).register_forward_pre_hook(
            lambda _, args, kwargs, name=name: inputs.update({name: [*args, *kwargs.values()][0]}),
            with_kwargs=True,
        )

    def closure() -> None:
        runs.append(built(X, attention_mask=MASK))

    paths = zoext.attach_side_paths(built, 2, closure=closure)
    assert len(runs) == 1
    assert torch.equal(runs[0], model()(X)), "B is zero"
    for name, path in paths.items():
        a = path.down.weight.double()
        torch.testing.assert_close(a @ a.T, torch.eye(2).double(), rtol=0, atol=1e-5)
        expected = leading(inputs[name][MASK.bool()], 2)
        assert torch.linalg.matrix_norm(a @ expected.T, 2) == pytest.approx(1, abs=1e-3), name
        assert torch.linalg.det(a @ expected.T).abs() > 0.98, name
        assert not path.down.weight.requires_grad


def test_without_a_mask_padding_counts() -> None:
    def first(mask: str | None) -> Tensor:
        built = model()
        return zoext.attach_side_paths(
            built, 2, names=["first"], mask=mask, closure=lambda: built(X, attention_mask=MASK)
        )["first"].down.weight

    assert not torch.allclose(first("attention_mask"), first(None))
    assert torch.linalg.det(first(None).double() @ leading(X.flatten(0, 1), 2).T).abs() > 0.98


def test_equal_batches_give_equal_bits() -> None:
    one, other = model(), model()
    found = [
        zoext.attach_side_paths(each, 3, seed=4, closure=lambda each=each: loss(each))
        for each in (one, other)
    ]
    for name, path in found[0].items():
        assert torch.equal(bits(path.down.weight), bits(found[1][name].down.weight))


def test_agzo_learns() -> None:
    built = model()
    zoext.attach_side_paths(built, 4, closure=lambda: loss(built))
    optimizer = zoext.AGZO(built, lr=0.05, mask=None, balance="freeze", probe="batched")
    values = [float(optimizer.step(lambda copies: losses(built, copies))) for _ in range(60)]
    assert values[-1] < values[0] - 0.1


@pytest.mark.parametrize(
    ("closure", "message"),
    [
        (lambda built: built.first(X), "closure did not run packed"),
        (lambda built: built(X * float("inf")), "not finite"),
        (lambda built: 1 / 0, "division by zero"),
    ],
)
def test_what_fails_leaves_the_model(closure: object, message: str) -> None:
    built = model()
    names = list(built.state_dict())
    with pytest.raises((ValueError, ZeroDivisionError), match=message):
        zoext.attach_side_paths(built, 4, closure=lambda: closure(built))  # type: ignore[operator]
    assert list(built.state_dict()) == names
    assert all(each.requires_grad for each in built.parameters())
    assert torch.equal(built(X), model()(X))
