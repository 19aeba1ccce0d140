"""A path is the displaced weight ``W + B A``, and its probes are those of LOZO along ``V = A^T``."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

import zoext
from support.side_paths import LABELS, X, filled, loss, losses, model
from zoext import ops

RANK = 4


def plain_loss(built: torch.nn.Module, moved: dict[str, Tensor]) -> Tensor:
    """The loss of the batch with matrices added to the weights of layers, by plain torch in float64."""
    first, packed, head = (built.get_submodule(name) for name in ("first", "packed", "head"))
    weights = [first.weight, packed.weight(torch.float64), head.weight]
    names = ("first", "packed", "head")
    w = [each + moved.get(name, 0) for each, name in zip(weights, names, strict=True)]
    h = torch.tanh(X.double() @ w[0].T + first.bias)
    logits = (torch.tanh(h @ w[1].T) @ w[2].T).mean(1)
    return torch.nn.functional.cross_entropy(logits, LABELS)


def test_they_begin_as_the_base() -> None:
    built = model(torch.bfloat16)
    before = {name: each.clone() for name, each in built.state_dict().items()}
    output = built(X.bfloat16())
    paths = zoext.attach_side_paths(built, RANK)
    assert torch.equal(built(X.bfloat16()), output)
    assert list(paths) == ["first", "packed", "head"]
    trainable = [name for name, each in built.named_parameters() if each.requires_grad]
    assert trainable == [f"{name}.side_path.up.weight" for name in paths]
    for name, path in paths.items():
        layer = built.get_submodule(name)
        assert layer.side_path is path
        assert path.up.weight.dtype == path.down.weight.dtype == torch.float32
    state = built.state_dict()
    assert all(torch.equal(state[name], each) for name, each in before.items())
    assert sum(each.numel() for each in state.values()) - sum(each.numel() for each in before.values()) == (
        RANK * (7 + 11 + 11 + 9 + 9 + 5)
    )


def test_the_projection_is_of_the_noise_field() -> None:
    """The layer's number among all linear layers keys it, whichever are named."""
    path = zoext.attach_side_paths(model(), 3, names=["head"], seed=-5)["head"]
    expected = zoext.noise.normal((3, 9), seed=-5, key=2, stream=ops.Stream.RIGHT_FACTOR) * 3**-0.5
    assert torch.equal(path.down.weight, expected)
    wide = zoext.attach_side_paths(model(), 100, names=["head"])["head"]
    assert wide.down.weight.shape == (9, 9)


@torch.no_grad()
def test_a_path_is_a_displaced_weight() -> None:
    built = model(torch.float64)
    paths = zoext.attach_side_paths(built, RANK)
    built.double()
    filled(paths)
    moved = {name: path.up.weight @ path.down.weight for name, path in paths.items()}
    assert abs(float(loss(built) - plain_loss(built, moved))) < 1e-12
    assert abs(float(loss(built) - plain_loss(built, {}))) > 1e-3


@pytest.mark.parametrize("probe", ["streamed", "inplace", "batched"])
@pytest.mark.parametrize("direction", [zoext.Gaussian(), zoext.LowRank(rank=2)], ids=["mezo", "lozo"])
def test_probes_displace_by_u_and_v_transposed(direction: zoext.Direction, probe: str) -> None:
    """MeZO has V = A^T, and LOZO has V = A^T V' with the V' of B."""
    mu, seed = 0.05, 11
    built = model(torch.float64)
    paths = zoext.attach_side_paths(built, RANK, seed=1)
    built.double()
    filled(paths)
    found: list[Tensor] = []

    def closure(copies: int = 1) -> Tensor:
        each = losses(built, copies)
        found.extend(each)
        return each if probe == "batched" else each[0]

    optimizer = zoext.ZerothOrderOptimizer(built, direction=direction, mu=mu, seed=seed, probe=probe)
    optimizer.estimate(closure)
    found.clear()  # of checks
    optimizer.estimate(closure)

    step = zoext.noise.step_seed(seed, 0)
    keys = {name: key for key, (name, _) in enumerate(built.named_parameters())}
    expected = []
    for sign in (1, -1):
        moved = {}
        for name, path in paths.items():
            key, b, a = keys[f"{name}.side_path.up.weight"], path.up.weight, path.down.weight
            if isinstance(direction, zoext.LowRank):
                left = zoext.noise.normal((2, len(b)), seed=step, key=key, stream=ops.Stream.LEFT_FACTOR)
                right = zoext.noise.normal((2, RANK), seed=step, key=key, stream=ops.Stream.RIGHT_FACTOR)
                u, v = left.double().T, (right.double() @ a).T
            else:
                u, v = zoext.noise.normal(b.shape, seed=step, key=key).double(), a.T
            moved[name] = b @ a + sign * mu * u @ v.T
        expected.append(plain_loss(built, moved))
    torch.testing.assert_close(torch.stack(found[-2:]), torch.stack(expected), rtol=0, atol=1e-7)


def test_steps_leave_the_base() -> None:
    built = model()
    before = {name: each.clone() for name, each in built.state_dict().items()}
    zoext.attach_side_paths(built, RANK)
    optimizer = zoext.LOZO(built, lr=0.05, rank=2, refresh_interval=5, probe="batched")
    values = [float(optimizer.step(lambda copies: losses(built, copies))) for _ in range(60)]
    assert values[-1] < values[0] - 0.1
    paths = zoext.detach_side_paths(built)
    assert all(path.up.weight.abs().max() > 0 for path in paths.values())
    after = built.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], each) for name, each in before.items())
    assert torch.equal(built(X), model()(X))
    assert not any(layer._forward_hooks for layer in built.modules())


def test_copies_run_their_own_paths() -> None:
    built = model()
    filled(zoext.attach_side_paths(built, RANK))
    output, twin = built(X), copy.deepcopy(built)
    twin.first.side_path.up.weight.data.zero_()
    assert torch.equal(built(X), output)
    assert not torch.equal(twin(X), output)
    zoext.detach_side_paths(twin)
    assert torch.equal(built(X), output)


def test_conv1d() -> None:
    transformers = pytest.importorskip("transformers")
    layer = transformers.pytorch_utils.Conv1D(5, 7)
    built = torch.nn.Sequential(layer).double()
    path = zoext.attach_side_paths(built, 3)["0"].double()
    filled({"0": path})
    expected = X.double() @ (layer.weight + (path.up.weight @ path.down.weight).T) + layer.bias
    torch.testing.assert_close(built(X.double()), expected, rtol=0, atol=1e-12)
