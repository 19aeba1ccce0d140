"""Forwards of modules whose copies of a batch have weights of their own, by the kind of the module.

A function here takes the block of the closure, the module, its forward at theta and the arguments of a call,
whose tensors hold the copies one after the other along their first dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from zoext import ops
from zoext._parameters import wrappers
from zoext._parameters.parameters import Parameters
from zoext.probes._batched.displacements import Displacements, Factors, rows_of
from zoext.probes._batched.replaced import own_forward

Forward = Callable[..., Any]

#: How many rows of a whole table are displaced in the time that handling a single row separately takes.
ROW_OVERHEAD = 8


class Layer(Protocol):
    def __call__(self, weights: Displacements, module: Any, forward: Forward, input: Tensor) -> Tensor:
        """The output for ``input``, whose copies are along the first dimension."""


def layer_of(module: nn.Module) -> Layer | None:
    """The function for a kind of module that takes one tensor; None for other kinds."""
    if own_forward(module) is not None:  # which may compute anything
        return None
    kind = type(module)
    if isinstance(module, nn.Linear) and kind.forward is nn.Linear.forward:
        return linear
    if kind in wrappers.conv1d():
        return transposed_linear
    if isinstance(module, nn.Embedding) and module.max_norm is None:
        return embedding
    if isinstance(module, nn.LayerNorm) and kind.forward is nn.LayerNorm.forward:
        return layer_norm
    if is_rms_norm(module):
        return rms_norm
    return None


def keeps_places(module: nn.Module) -> bool:
    """Whether the copies lie in the output of a module where they lie in its input."""
    layer = layer_of(module)
    is_plain = layer is not embedding or type(module).forward is nn.Embedding.forward
    return layer in (linear, transposed_linear, layer_norm, embedding) and is_plain


def factorable(module: nn.Module) -> Tensor | None:
    """The weight of which the module needs only the factors of its displacement."""
    if layer_of(module) in (linear, transposed_linear, embedding):
        weight = module.weight
        assert isinstance(weight, Tensor)
        return weight
    return None


def linear(weights: Displacements, module: nn.Linear, forward: Forward, input: Tensor) -> Tensor:
    return _linear(weights, module.weight, module.bias, forward, input, is_transposed=False)


def transposed_linear(weights: Displacements, module: Any, forward: Forward, input: Tensor) -> Tensor:
    return _linear(weights, module.weight, module.bias, forward, input, is_transposed=True)


def _linear(
    weights: Displacements,
    weight: Tensor,
    bias: Tensor | None,
    forward: Forward,
    input: Tensor,
    *,
    is_transposed: bool,
) -> Tensor:
    copies = weights.copies
    output: Tensor
    rows = input.reshape(copies, -1, input.shape[-1])
    factors = weights.factors(weight)
    if factors is None and weights.moves(weight):
        biases = None if bias is None else weights.weights([bias])[0].unsqueeze(1)
        if is_transposed:
            (matrices,) = weights.weights([weight])
            output = _product(rows, matrices, biases)
        else:
            output = _product_by_pieces(weights, weight, biases, rows)
        return output.view(*input.shape[:-1], output.shape[-1])
    output = forward(input)
    by_copy = output.view(copies, -1, output.shape[-1])
    if factors is not None:
        add_side_path(by_copy, rows, factors, is_transposed=is_transposed)
    if bias is not None and weights.moves(bias):
        by_copy += weights.shift(bias)
    return output


def _product_by_pieces(weights: Displacements, weight: Tensor, biases: Tensor | None, rows: Tensor) -> Tensor:
    """The product of the rows of each copy with its transposed weights, of which few exist at a time."""
    output = None
    for columns, matrices in weights.pieces(weight):
        own = None if biases is None else biases[..., columns]
        part = _product(rows, matrices.mT, own)
        if part.shape[-1] == len(weight):
            return part
        if output is None:
            output = part.new_empty((*rows.shape[:-1], len(weight)))
        output[..., columns] = part
    assert output is not None
    return output


def _product(rows: Tensor, matrices: Tensor, biases: Tensor | None) -> Tensor:
    if biases is None:
        return torch.bmm(rows, matrices)
    return torch.baddbmm(biases, rows, matrices)  # rounded once, as in a linear layer


def add_side_path(output: Tensor, input: Tensor, factors: Factors, *, is_transposed: bool) -> None:
    """``output[c] += input[c] D_c^T`` for the displacement ``D_c`` of a copy, [C, T, m] and [C, T, n]."""
    left, right, coefficients = factors
    if is_transposed:
        left, right = right, left
    if input.dtype != output.dtype:  # autocast
        input = input.to(output.dtype)
    ops.factored_linear_(output, input.contiguous(), left, right, coefficients)


def embedding(weights: Displacements, module: nn.Embedding, forward: Forward, input: Tensor) -> Tensor:
    if not weights.moves(module.weight):
        result: Tensor = forward(input)
        return result
    if type(module).forward is nn.Embedding.forward:
        return _rows_of(weights, module, input)
    # A subclass may change the indices, or scale what was read.
    read: Tensor = looked_up(weights, module, lambda: forward(input))
    return read


class NotLookedUp(Exception):
    """A subclass of ``nn.Embedding`` does not call ``functional.embedding`` on its table."""


def looked_up(weights: Displacements, module: Any, forward: Callable[[], Any]) -> Any:
    """A forward in which rows of the table are those of each copy, for subclasses of ``nn.Embedding``.

    Raises:
        NotLookedUp: if it reads the table in another way.
    """
    with _Lookups(weights, module) as lookups:
        found = forward()
    if not lookups.has_read:
        raise NotLookedUp
    return found


class _Lookups(torch.overrides.TorchFunctionMode):
    """Reads the rows of each copy where a subclass of ``nn.Embedding`` reads its table."""

    def __init__(self, weights: Displacements, module: nn.Embedding) -> None:
        super().__init__()
        self.has_read = False
        self._weights, self._module = weights, module

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.embedding:
            index = args[0] if args else kwargs["input"]
            table = args[1] if len(args) > 1 else kwargs["weight"]
            if table is self._module.weight:
                self.has_read = True
                return _rows_of(self._weights, self._module, index)
        return func(*args, **kwargs)


def _rows_of(weights: Displacements, module: nn.Embedding, index: Tensor) -> Tensor:
    table, copies = module.weight, weights.copies
    if (factors := weights.factors(table)) is not None:
        output = functional.embedding(index, table)
        _add_rows(output.view(copies, -1, table.shape[1]), index.reshape(-1), factors)
        return output
    if table.device.type == "cpu" and index.numel() * ROW_OVERHEAD <= len(table):
        found, places = torch.unique(index, return_inverse=True)
        displaced = weights.rows(table, _some_rows(weights, table, found))
        places = places.view(copies, -1)
        output = torch.stack([displaced[copy][places[copy]] for copy in range(copies)])
    else:
        (tables,) = weights.weights([table])
        each = index.reshape(copies, -1)
        output = torch.stack([functional.embedding(each[copy], tables[copy]) for copy in range(copies)])
    return output.view(*index.shape, table.shape[1])


def _some_rows(weights: Displacements, table: Tensor, rows: Tensor) -> Parameters:
    found = functional.embedding(rows, table.detach())  # refuses rows that do not exist
    return rows_of(*weights.key_of(table), found.split(1), rows.tolist())


def _add_rows(output: Tensor, index: Tensor, factors: Factors) -> None:
    """``output[c] += (rows of D_c)``, with the rows of the left factors that are read."""
    copies, rows, _ = output.shape
    dtype = torch.promote_types(output.dtype, torch.float32)
    left, right, coefficients = (each.to(dtype) for each in factors)
    left = left.index_select(2, index).unflatten(2, (copies, rows))  # [K or 1, rank, C, T]
    left = left.expand(coefficients.shape[1], -1, -1, -1)
    if len(right) == 1:
        output += torch.einsum("ck,krct->ctr", coefficients, left) @ right[0]
    else:
        output += torch.einsum("ck,krct,krd->ctd", coefficients, left, right)


def layer_norm(weights: Displacements, module: nn.LayerNorm, forward: Forward, input: Tensor) -> Tensor:
    own = [each for each in (module.weight, module.bias) if each is not None]
    if not any(map(weights.moves, own)):
        result: Tensor = forward(input)
        return result
    values = weights.weights(own)
    parts = input.chunk(weights.copies)
    shape, eps = module.normalized_shape, module.eps
    found = []
    for copy, part in enumerate(parts):
        weight, *bias = (value[copy] for value in values)
        found.append(functional.layer_norm(part, shape, weight, bias[0] if bias else None, eps))
    return torch.cat(found)


def is_rms_norm(module: nn.Module) -> bool:
    """Whether a module normalizes and multiplies with a vector of its own, as the RMSNorms of transformers.

    They are known by name, and whether they compute the same with a weight for each row is tried once.
    """
    own = module._parameters
    weight = own.get("weight")
    is_norm = type(module).__name__.endswith("RMSNorm") and not isinstance(module, nn.RMSNorm)
    return is_norm and len(own) == 1 and weight is not None and weight.dim() == 1 and not module._modules


def rms_norm(weights: Displacements, module: Any, forward: Forward, input: Tensor) -> Tensor:
    weight = module.weight
    if not weights.moves(weight):
        result: Tensor = forward(input)
        return result
    (values,) = weights.weights([weight])
    return with_rows(module, forward, input, values)


def with_rows(module: nn.Module, forward: Forward, input: Tensor, values: Tensor) -> Tensor:
    """The forward with a weight for each row of the first dimension, from one for each copy, [C, d]."""
    copies, width = values.shape
    rows = values.unsqueeze(1).expand(copies, len(input) // copies, width).reshape(len(input), width)
    own = module._parameters["weight"]
    module._parameters["weight"] = rows.view(len(input), *(1,) * (input.dim() - 2), width)  # type: ignore[assignment]
    try:
        result: Tensor = forward(input)
        return result
    finally:
        module._parameters["weight"] = own


#: The kinds of layers that only read weights.
READING: tuple[Layer, ...] = (linear, transposed_linear, layer_norm)
