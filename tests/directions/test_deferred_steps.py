"""``LowRank(defer=True)``: steps are held back, and everyone who looks sees weights that have them."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zoext

INTERVAL = 4
OPTIONS: dict[str, Any] = {"lr": 1e-4, "mu": 1e-2, "seed": 11}


class Model(nn.Module):
    """Linear layers, a table that the head shares, a convolution's kernel, vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(13, 6)
        self.wide = nn.Linear(6, 9)
        self.norm = nn.LayerNorm(9)
        self.kernel = nn.Conv1d(9, 6, 3, padding=1)
        self.head = nn.Linear(6, 13, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.norm(torch.tanh(self.wide(self.table(tokens))))
        return self.head(self.kernel(hidden.mT).mT)


def setup(
    defer: bool = True,
    dtype: torch.dtype = torch.float64,
    estimator: zoext.Estimator | None = None,
    **options: Any,
) -> tuple[Model, zoext.ZerothOrderOptimizer]:
    torch.manual_seed(2)
    model = Model().to(dtype)
    direction = zoext.LowRank(rank=3, refresh_interval=INTERVAL, defer=defer)
    both = {**OPTIONS, **options}
    return model, zoext.ZerothOrderOptimizer(model, direction=direction, estimator=estimator, **both)


def loss_of(model: nn.Module, step: int) -> Tensor:
    tokens = torch.randint(13, (3, 5), generator=torch.Generator().manual_seed(step))
    return model(tokens).double().square().mean()


def take(model: nn.Module, optimizer: zoext.ZerothOrderOptimizer, steps: range) -> None:
    for step in steps:
        optimizer.step(lambda step=step: loss_of(model, step))


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def close(a: dict[str, Tensor], b: dict[str, Tensor], start: dict[str, Tensor]) -> bool:
    """Within 1e-5 of the distance moved."""
    return all((a[n] - b[n]).abs().max() <= 1e-5 * (b[n] - start[n]).abs().max() for n in a)


@pytest.mark.parametrize(
    "estimator",
    [
        zoext.CentralDifference(samples=2),
        zoext.ForwardDifference(samples=2),  # whose centre lacks the sum as well
        zoext.GuidingVector(pool_size=3, elite_ratio=0.4),
        zoext.Population(4, shaping="zscore"),
    ],
)
@pytest.mark.parametrize("steps", [3, INTERVAL, 10])
def test_the_path_is_that_of_written_steps(estimator: zoext.Estimator, steps: int) -> None:
    (model, optimizer), (plain, other) = setup(estimator=estimator), setup(False, estimator=estimator)
    start = weights(model)
    take(model, optimizer, range(steps))
    take(plain, other, range(steps))
    optimizer.merge()
    assert close(weights(model), weights(plain), start)
    assert optimizer.last_estimate.forwards == other.last_estimate.forwards


@pytest.mark.parametrize(
    "estimator", [zoext.CentralDifference(samples=2), zoext.ForwardDifference(samples=2)], ids=["two", "one"]
)
@pytest.mark.parametrize("most", [None, 1])
def test_batched_probes_add_the_sum(estimator: zoext.Estimator, most: int | None) -> None:
    (model, _), (plain, other) = setup(), setup(False, estimator=estimator)
    start = weights(model)
    optimizer = zoext.ZerothOrderOptimizer(
        model,
        direction=zoext.LowRank(rank=3, refresh_interval=INTERVAL, defer=True),
        estimator=estimator,
        probe=zoext.BatchedProbe(model, max_copies=most),
        **OPTIONS,
    )
    for step in range(10):
        tokens = torch.randint(13, (3, 5), generator=torch.Generator().manual_seed(step))

        def closure(copies: int, tokens: Tensor = tokens) -> Tensor:
            outputs = model(zoext.repeat({"tokens": tokens}, copies)["tokens"])
            return zoext.mean_per_copy(outputs.double().square().mean((1, 2)), copies)

        optimizer.step(closure)
        if step == INTERVAL - 1:
            assert torch.equal(model.wide.weight, start["wide.weight"])
    take(plain, other, range(10))
    optimizer.merge()
    assert close(weights(model), weights(plain), start)


def test_matrices_are_written_once_an_interval() -> None:
    model, optimizer = setup()
    start = weights(model)
    take(model, optimizer, range(INTERVAL))
    for name, value in weights(model).items():
        assert torch.equal(value, start[name]) == (value.dim() > 1)
    take(model, optimizer, range(INTERVAL, INTERVAL + 1))
    written = weights(model)
    assert not any(torch.equal(value, start[name]) for name, value in written.items())
    take(model, optimizer, range(INTERVAL + 1, 2 * INTERVAL))
    assert torch.equal(model.wide.weight, written["wide.weight"])


LOOKS: dict[str, Callable[[Model, zoext.ZerothOrderOptimizer], object]] = {
    "merge": lambda model, optimizer: optimizer.merge(),
    "forward": lambda model, optimizer: loss_of(model, 0),
    "forward of a part": lambda model, optimizer: model.wide(torch.ones(6, dtype=model.wide.weight.dtype)),
    "state_dict": lambda model, optimizer: model.state_dict(),
    "state_dict of a part": lambda model, optimizer: model.kernel.state_dict(),
    "state_dict of the optimizer": lambda model, optimizer: optimizer.state_dict(),
    "load_state_dict": lambda model, optimizer: model.wide.load_state_dict({}, strict=False),
}


@pytest.mark.parametrize("look", LOOKS)
def test_who_looks_sees_all_steps(look: str) -> None:
    (model, optimizer), (plain, other) = setup(), setup(False)
    start = weights(model)
    take(model, optimizer, range(6))
    take(plain, other, range(6))
    assert torch.equal(model.head.weight, model.table.weight)
    stale = weights(model)
    LOOKS[look](model, optimizer)
    assert not torch.equal(stale["wide.weight"], model.wide.weight)
    assert close(weights(model), weights(plain), start)
    seen = weights(model)
    optimizer.merge()
    assert all(torch.equal(value, seen[name]) for name, value in weights(model).items())
    hooks = [len(part._forward_pre_hooks) for part in model.modules()]
    assert not any(hooks)
    take(model, optimizer, range(6, 10))
    take(plain, other, range(6, 10))
    optimizer.merge()
    assert close(weights(model), weights(plain), start)


def test_a_state_dict_holds_all_steps() -> None:
    (model, optimizer), (plain, other) = setup(), setup(False)
    start = weights(model)
    take(model, optimizer, range(6))
    take(plain, other, range(6))
    saved = {name: value for name, value in model.state_dict().items() if name in start}
    assert close(saved, weights(plain), start)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("precision", ["nearest", "stochastic", "residual"])
def test_a_saved_run_continues_bit_for_bit(dtype: torch.dtype, precision: str) -> None:
    """In the middle of an interval. Saving writes the sums, so the run that goes on does so too."""
    model, optimizer = setup(dtype=dtype, precision=precision)
    take(model, optimizer, range(6))
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    fresh, another = setup(dtype=dtype, precision=precision)
    for part, state in zip((fresh, another), torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    for each in ((model, optimizer), (fresh, another)):
        take(*each, range(6, 11))
        each[1].merge()
    assert all(torch.equal(value, weights(fresh)[name]) for name, value in weights(model).items())


def test_states_of_earlier_versions_are_loaded() -> None:
    """Their recipes do not have the option, and mean False."""
    model, optimizer = setup(False)
    take(model, optimizer, range(2))
    state = optimizer.state_dict()
    del state["param_groups"][0]["recipe"]["direction"]["defer"]
    _, another = setup(False)
    another.load_state_dict(state)
    assert another.param_groups[0]["step"] == 2
    with pytest.raises(ValueError, match="build it with the same direction"):
        setup(True)[1].load_state_dict(state)


def test_16_bit_weights_are_rounded_once() -> None:
    """Steps of less than a unit in the last place, written one by one, lose more than their sum."""
    cosines = []
    for defer in (True, False):
        exact, reference = setup(False, lr=0.05)
        model, optimizer = setup(defer, torch.bfloat16, precision="nearest", lr=0.05)
        exact.load_state_dict(model.state_dict())
        before = weights(exact)["wide.weight"]
        for step in range(INTERVAL):  # the same steps, whatever the losses in bfloat16 are
            for each in (optimizer, reference):
                each.ask()
                assert each.tell([1e-4 * (1 + step % 2), 0.0]) is None
                each.step()
        optimizer.merge()
        changes = [(weights(each)["wide.weight"].double() - before).flatten() for each in (model, exact)]
        cosines.append(float(torch.cosine_similarity(*changes, 0)))
    assert cosines[0] > cosines[1] + 0.05


def test_ask_and_tell_equal_steps() -> None:
    (model, optimizer), (plain, other) = setup(), setup()
    for step in range(6):
        optimizer.step(lambda step=step: loss_of(model, step))
        pending = other.ask()
        losses = []
        for index in range(len(pending)):
            with pending.displaced(index):
                losses.append(loss_of(plain, step))
        assert other.tell(losses) is None
        other.step()
    optimizer.merge()
    other.merge()
    assert all(torch.equal(value, weights(plain)[name]) for name, value in weights(model).items())
    take(model, optimizer, range(6, 7))
    with pytest.raises(RuntimeError, match=r"adapter: the weights lack steps .* call merge\(\) before ask"):
        optimizer.ask().adapter(0)


def test_a_look_in_an_open_round_does_not_count_twice() -> None:
    (model, optimizer), (plain, other) = setup(), setup(False)
    take(model, optimizer, range(6))
    take(plain, other, range(6))
    losses = []
    for its, each in ((model, optimizer), (plain, other)):
        pending = each.ask()
        loss_of(its, 0)
        with pending.displaced(1):
            losses.append(loss_of(its, 6))
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)


def test_a_frozen_weight_keeps_its_steps() -> None:
    (model, optimizer), (plain, other) = setup(), setup(False)
    start = weights(model)
    for each, its in ((model, optimizer), (plain, other)):
        take(each, its, range(6))
        each.wide.weight.requires_grad_(False)
        take(each, its, range(6, 10))
        its.merge()
    assert close(weights(model), weights(plain), start)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"probe: InplaceProbe does not add the steps that defer=True"):
        setup(probe="inplace")
    with pytest.raises(ValueError, match=r"process_group: a member that joins an ElasticGroup gets"):
        setup(
            process_group=zoext.distributed.ElasticGroup(torch.distributed.HashStore(), members=1, member=0)
        )
    with pytest.raises(ValueError, match=r"weight_decay must be 0 with defer=True, not 0\.1"):
        setup(weight_decay=0.1)
    with pytest.raises(ValueError, match=r"update: AdamReplay does not add a combination .* use SGD"):
        setup(update=zoext.AdamReplay())
    with pytest.raises(ValueError, match=r"defer must be True or False, not 1"):
        zoext.LowRank(defer=1)
    model, optimizer = setup()
    optimizer.param_groups[0]["weight_decay"] = 0.2
    with pytest.raises(ValueError, match=r"weight_decay must be 0 with defer=True, not 0\.2"):
        take(model, optimizer, range(1))


@pytest.mark.parametrize("probe", ["streamed", "batched", "inplace"])
def test_a_probe_of_another_optimizer_sees_all_steps(probe: str) -> None:
    (model, optimizer), (plain, written) = setup(), setup(False)
    start = weights(model)
    take(model, optimizer, range(3))
    take(plain, written, range(3))
    losses = []
    for its in (model, plain):
        other = zoext.MeZO(its, lr=1e-3, seed=4, probe=probe)

        def closure(copies: int = 1, its: nn.Module = its) -> Tensor:
            losses.append(loss_of(its, 0))
            return losses[-1].expand(copies) if probe == "batched" else losses[-1]

        if probe == "batched":
            with pytest.raises(zoext.BatchedProbeError):
                other.estimate(closure)  # which has one loss for all copies: it merged before that
        else:
            other.estimate(closure)
    assert close(weights(model), weights(plain), start)
