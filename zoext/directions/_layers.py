"""The weights whose activations can be observed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from zoext._parameters import wrappers
from zoext._parameters.parameters import Parameters


@dataclass(frozen=True, slots=True)
class Layer:
    """A linear layer with a trainable weight."""

    module: nn.Module
    name: str  # of its weight
    key: int
    transposed: bool  # the weight is [d_in, d_out], not [d_out, d_in]

    @property
    def weight(self) -> Tensor:
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def width(self) -> int:
        """d_in."""
        return self.weight.shape[0 if self.transposed else 1]

    @property
    def side(self) -> str:
        """The factor that its activations determine."""
        return "left" if self.transposed else "right"


@dataclass(frozen=True, slots=True)
class Stack:
    """A trainable parameter [entries, d_out, d_in] or [entries, d_in, d_out], such as that of experts."""

    weight: Tensor
    name: str
    key: int


def linear_layers(module: nn.Module, groups: Sequence[Parameters]) -> list[Layer]:
    """The linear layers in ``module`` whose weights are in ``groups`` and only used by linear layers."""
    names = _names(groups)
    layers, used_otherwise = [], set()
    for part in module.modules():
        linear = _is_linear(part)
        for own, parameter in part._parameters.items():
            if linear is None or own != "weight":
                used_otherwise.add(id(parameter))
            elif id(parameter) in names:
                key, name = names[id(parameter)]
                layers.append(Layer(part, name, key, linear == "transposed"))
    return [layer for layer in layers if id(layer.weight) not in used_otherwise and layer.weight.numel()]


def stacks(module: nn.Module, groups: Sequence[Parameters]) -> list[Stack]:
    """The parameters of three dimensions in ``module`` and ``groups`` that no convolution owns."""
    if all(tensor.dim() != 3 for group in groups for tensor in group.owners):
        return []
    names = _names(groups)
    found, used_otherwise = {}, set()
    for part in module.modules():
        for parameter in part._parameters.values():
            if isinstance(part, _ConvNd | torch.jit.ScriptModule):
                used_otherwise.add(id(parameter))
            elif id(parameter) in names and parameter is not None and parameter.dim() == 3:
                key, name = names[id(parameter)]
                found[id(parameter)] = Stack(parameter, name, key)
    return [stack for each, stack in found.items() if each not in used_otherwise and stack.weight.numel()]


def scripted_layers(module: nn.Module, groups: Sequence[Parameters]) -> Iterator[str]:
    """The names of modules compiled by torch.jit that own a weight of a linear layer in ``groups``."""
    names = _names(groups)
    for name, part in module.named_modules():
        is_linear = getattr(part, "original_name", "") == "Linear"
        if not isinstance(part, torch.jit.ScriptModule) or not is_linear:
            continue
        if any(id(parameter) in names for parameter in part.parameters(recurse=False)):
            yield name or "the module itself"


def _names(groups: Sequence[Parameters]) -> dict[int, tuple[int, str]]:
    return {
        id(tensor): (key, name)
        for group in groups
        for tensor, key, name in zip(group.owners, group.keys, group.names, strict=True)
    }


def _is_linear(module: nn.Module) -> str | None:
    if isinstance(module, NonDynamicallyQuantizableLinear):  # attention reads its weight and never calls it
        return None
    if isinstance(module, nn.Linear):
        return "plain"
    return "transposed" if isinstance(module, wrappers.conv1d()) else None
