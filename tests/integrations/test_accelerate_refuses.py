"""What Accelerate cannot do without gradients is refused before anything runs."""

from __future__ import annotations

import pytest
import torch

import zoext
from support.accelerate_loops import RECIPES, accelerator, loader, loss_of, net, reset, weights_of
from zoext.integrations.accelerate import ZOAccelerator

accelerate = pytest.importorskip("accelerate", reason="needs Accelerate")


def test_the_gradient_scaler(monkeypatch: pytest.MonkeyPatch) -> None:
    reset()
    monkeypatch.setattr(ZOAccelerator, "mixed_precision", "fp16")  # which needs CUDA
    with pytest.raises(ValueError, match="mixed_precision='fp16' scales gradients"), accelerator():
        pass


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED", "MEGATRON_LM"])
def test_launches_that_shard(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reset()
    monkeypatch.setattr(ZOAccelerator, "distributed_type", accelerate.DistributedType[kind])
    with pytest.raises(ValueError, match=f"distributed_type is {kind}.*whole weights"), accelerator():
        pass


def test_another_optimizer() -> None:
    with accelerator() as each, pytest.raises(TypeError, match="must be a ZerothOrderOptimizer"):
        each.prepare(torch.optim.SGD(net().parameters()))


def test_several_processes_without_a_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    with accelerator() as each:
        monkeypatch.setattr(ZOAccelerator, "num_processes", 2)
        with pytest.raises(ValueError, match=r"2 processes train.*process_group='auto'"):
            each.prepare_optimizer(zoext.MeZO(net(), process_group=None))


def test_a_backward() -> None:
    with accelerator() as each, pytest.raises(RuntimeError, match="delete this line"):
        each.backward(loss_of(net(), *next(iter(loader(4)))))


def test_a_closure_over_a_variable_of_the_loop() -> None:
    with accelerator(gradient_accumulation_steps=2) as each:
        model = net()
        before = weights_of(model)
        model, optimizer = each.prepare(model, RECIPES["MeZO"](model))
        for batch in loader(4):
            with each.accumulate(model), pytest.raises(TypeError, match="pass the batch"):
                optimizer.step(lambda batch=batch: loss_of(model, *batch))
        assert torch.equal(weights_of(model), before)


def test_the_optimizer_of_plain_accelerate_while_it_accumulates() -> None:
    """It would not run the closures of all micro-batches."""
    reset()
    each = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = net()
    before = weights_of(model)
    model, optimizer = each.prepare(model, RECIPES["MeZO"](model))
    message = "runs the closure of one micro-batch in 2 only.*ZOAccelerator"
    for index, batch in enumerate(loader(4)):
        with each.accumulate(model):
            if index % 2:
                with pytest.raises(RuntimeError, match=message):
                    optimizer.step(lambda batch=batch: loss_of(model, *batch))
            else:
                optimizer.step(lambda batch=batch: loss_of(model, *batch))
    assert torch.equal(weights_of(model), before)
    optimizer.optimizer.step(lambda: loss_of(model, *batch))  # not by Accelerate
    optimizer.optimizer.estimate(lambda: loss_of(model, *batch))
    optimizer.step()
    reset()
