"""Trainable low-rank paths beside frozen linear layers, whose weights may be packed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from zoext import noise, ops
from zoext._engine import merge_all
from zoext._parameters import parameters, wrappers
from zoext._runtime.arguments import check_count
from zoext.directions import ActivationSubspace, Step

#: The name of a path in its layer.
NAME = "side_path"

_UNCALLED = NonDynamicallyQuantizableLinear


class SidePath(nn.Module):
    """``B (A x)``, which ``attach_side_paths`` adds to the output of a linear layer.

    Attributes:
        down: holds A, float32 [rank, d_in], frozen.
        up: holds B, float32 [d_out, rank], zeros at first. It trains.
    """

    # Names, since a copy of the model, or of a part of it, must find its own. Models that were pickled by
    # earlier versions have none.
    _name: str = ""
    _frozen: tuple[str, ...] = ()

    def __init__(self, projection: Tensor, width: int) -> None:
        super().__init__()
        rank, inputs = projection.shape
        self.down = _linear(inputs, rank, projection)
        self.up = _linear(rank, width, projection.new_zeros(width, rank))
        self.down.requires_grad_(False)

    @property
    def rank(self) -> int:
        return self.down.out_features

    def note(self, name: str, frozen: tuple[str, ...]) -> None:
        """Keeps the name of its layer, and of the parameters that trained before the path was added."""
        self._name, self._frozen = name, frozen

    def frozen_in(self, name: str) -> set[str]:
        """The names of these parameters in a model that calls the layer ``name``, larger or a part."""
        own = self._name
        if name.endswith(own):
            added = _prefix(name.removesuffix(own))
            return {added + each for each in self._frozen}
        left_out = _prefix(own.removesuffix(name))
        return {each.removeprefix(left_out) for each in self._frozen if each.startswith(left_out)}

    def forward(self, input: Tensor) -> Tensor:
        """[..., d_in] -> [..., d_out], in the dtype of the factors."""
        output: Tensor = self.up(self.down(input.to(self.down.weight)))  # its dtype and its device
        return output


def attach_side_paths(
    model: nn.Module,
    rank: int = 8,
    *,
    names: str | Sequence[str] | None = None,
    seed: int = 0,
    closure: Callable[[], Any] | None = None,
    mask: str | None = "attention_mask",
) -> dict[str, SidePath]:
    """Adds a trainable low-rank path to frozen linear layers: ``y = W x + B A x``.

        model = AutoModelForCausalLM.from_pretrained(name, quantization_config=four_bits)
        zoext.attach_side_paths(model, rank=16)
        optimizer = zoext.LOZO(model, rank=2, refresh_interval=50)

    All parameters of the model are frozen, and B of each path trains. W is never read or written, so it may
    be packed in any format. B begins at zero, so the outputs are those of the base.

    A is drawn once, normals of variance 1 / rank, so that a direction of MeZO or LOZO on B displaces the
    layer by as much, in expectation, as one on W: begin with the ``lr`` and ``mu`` of W. MeZO on B is LOZO on
    W whose V is drawn once, ``V = A^T``. LOZO on B is LOZO on W whose V is redrawn from the combinations of
    the rows of A. The change of a layer has at most this rank, however many steps are taken.

    With a closure, the rows of A are instead an orthonormal basis of the leading part of the layer's inputs
    in one forward, as in AGZO. AGZO on B finds the basis of each step within it, and its directions have the
    norm of those of AGZO on W.

    The factors are ordinary parameters, ``<layer>.side_path.down.weight`` (A) and ``.up.weight`` (B) in
    ``state_dict``. Trajectories record and replay B; attach paths with equal arguments before a replay.

    Args:
        model: its layers may be ``nn.Linear`` and subclasses, ``Conv1D`` of transformers, and any module that
            has ``in_features`` and ``out_features``, as packed layers do.
        rank: rows of A; a layer with fewer inputs has as many as these. Memory is ``(d_in + d_out) rank``
            float32 numbers for each layer. Default 8.
        names: the names of layers, or last parts that several have, such as "q_proj", or patterns of
            ``fnmatch``, such as "*_proj". None (default) means all linear layers except the output layer of a
            model of transformers.
        seed: 64-bit seed of A, which has the same bits on every device. Default 0.
        closure: runs the model on a batch once, such as ``lambda: model(**batch)``, to find A from
            activations. A layer whose inputs span less than the rank has rows of zeros.
        mask: with a closure, the argument of the model's forward that is 0 at padding, which is left out.

    Returns:
        The paths by the names of their layers.

    Raises:
        ValueError: for arguments out of range, names that no linear layer has, a layer that has a path
            already or whose weight is read without calling it, adapters of PEFT, and a closure that leaves a
            layer out or whose activations are not finite. The model is then as it was.
        TypeError: if a part of the model is compiled.
    """
    check_count("rank", rank)
    noise.signed(seed)
    layers = _chosen(model, names)
    paths = {name: _path(layer, rank, seed, key) for name, (key, layer) in layers.items()}
    earlier = {id(each) for path in paths_of(model).values() for each in path.parameters()}
    trainable = {
        name: each
        for name, each in model.named_parameters(remove_duplicate=False)
        if each.requires_grad and id(each) not in earlier
    }
    for each in trainable.values():
        each.requires_grad_(False)
    for name, (_, layer) in layers.items():
        paths[name].note(name, tuple(trainable))
        layer.add_module(NAME, paths[name])
        layer.register_forward_hook(_add_path, with_kwargs=True)
    if closure is not None:
        try:
            _calibrate(model, paths, rank, seed, closure, mask)
        except BaseException:
            _detach(model, paths)
            raise
    return paths


def paths_of(model: nn.Module) -> dict[str, SidePath]:
    """The paths of a model by the names of their layers."""
    found = ((name, layer._modules.get(NAME)) for name, layer in model.named_modules())
    return {name: path for name, path in found if isinstance(path, SidePath)}


def detach_side_paths(model: nn.Module) -> dict[str, SidePath]:
    """Removes all paths and returns them by the names of their layers; the model is then its base.

    Parameters that trained before ``attach_side_paths`` do so again. Steps that ``LowRank(defer=True)`` holds
    back are merged into the paths.

    Raises:
        RuntimeError: within a closure of an optimizer that holds steps back.
    """
    paths = paths_of(model)
    merge_all(weight for path in paths.values() for weight in path.parameters())
    _detach(model, paths)
    return paths


def _detach(model: nn.Module, paths: Mapping[str, SidePath]) -> None:
    frozen: set[str] = set()
    for name, path in paths.items():
        frozen |= path.frozen_in(name)
        layer = model.get_submodule(name)
        del layer._modules[NAME]
        for key in [key for key, hook in layer._forward_hooks.items() if hook is _add_path]:
            del layer._forward_hooks[key]
            layer._forward_hooks_with_kwargs.pop(key, None)
    for name, each in model.named_parameters(remove_duplicate=False):
        if name in frozen and each.is_floating_point():  # the model may have been packed since
            each.requires_grad_(True)


def _prefix(name: str) -> str:
    """What the names of all that is in a module begin with."""
    return f"{name.removesuffix('.')}." if name else ""


def widths_of(layer: nn.Module) -> tuple[int, int] | None:
    """d_in and d_out of a linear layer of any kind; None for other modules."""
    if isinstance(layer, wrappers.conv1d()):
        weight = layer.weight
        assert isinstance(weight, Tensor)
        return weight.shape[0], weight.shape[1]
    found = getattr(layer, "in_features", None), getattr(layer, "out_features", None)
    inputs, outputs = found
    return (inputs, outputs) if isinstance(inputs, int) and isinstance(outputs, int) else None


def _linear(inputs: int, outputs: int, weight: Tensor) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=False, device="meta")  # draws no random numbers
    layer.weight = nn.Parameter(weight)
    return layer


def _add_path(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
    """A forward hook. It finds the path in the layer, so that a copy of the model runs its own."""
    path = layer._modules.get(NAME)
    if path is None:
        return output
    input = args[0] if args else next(iter(kwargs.values()))
    added: Tensor = path(input)
    return output + added.to(output)


def _path(layer: nn.Module, rank: int, seed: int, key: int) -> SidePath:
    inputs, outputs = widths_of(layer) or (0, 0)
    rank = min(rank, inputs)
    device = next((each.device for each in (*layer.parameters(), *layer.buffers())), torch.device("cpu"))
    projection = noise.normal(
        (rank, inputs), seed=seed, key=key, stream=ops.Stream.RIGHT_FACTOR, device=device
    )
    return SidePath(projection * rank**-0.5, outputs)


def _linear_layers(model: nn.Module) -> dict[str, tuple[int, nn.Module]]:
    """Linear layers by their names, and their numbers among all of the model, which key the noise of A."""
    own = {part for path in paths_of(model).values() for part in path.modules()}
    found = [
        (name, layer)
        for name, layer in model.named_modules()
        if layer not in own and min(widths_of(layer) or (0,)) > 0
    ]
    return {name: (key, layer) for key, (name, layer) in enumerate(found)}


def _chosen(model: nn.Module, names: str | Sequence[str] | None) -> dict[str, tuple[int, nn.Module]]:
    if wrappers.is_compiled(model):
        raise TypeError("model: a part of it is compiled; attach side paths to the module it was made from")
    if hasattr(model, "peft_config"):
        raise ValueError(
            "model has adapters of PEFT, which are low-rank paths already: train these, or pass the base"
        )
    found = _linear_layers(model)
    if names is None:
        head = getattr(model, "get_output_embeddings", lambda: None)()
        chosen = {
            name: (key, layer)
            for name, (key, layer) in found.items()
            if layer is not head and not isinstance(layer, _UNCALLED)
        }
    else:
        chosen = {}
        for wanted in [names] if isinstance(names, str) else names:
            own = [wanted] if wanted in found else [name for name in found if _fits(name, wanted)]
            if not own:
                known = ", ".join(sorted({name.rpartition(".")[2] for name in found})[:12])
                raise ValueError(f"names: no linear layer is called {wanted!r}; there are {known or 'none'}")
            chosen |= {name: found[name] for name in own}
    if not chosen:
        raise ValueError("names: there is no linear layer that a side path can be added to")
    for name, (_, layer) in chosen.items():
        _check(name, layer)
    return chosen


def _fits(name: str, wanted: str) -> bool:
    return name.endswith(f".{wanted}") or fnmatchcase(name, wanted)


def _check(name: str, layer: nn.Module) -> None:
    if NAME in layer._modules:
        raise ValueError(
            f"{name} has a side path already; call detach_side_paths(model) first, or name others"
        )
    if isinstance(layer, _UNCALLED):
        raise ValueError(
            f"{name}: nn.MultiheadAttention reads its weight without calling it; name other layers"
        )
    if any(each.is_meta for each in layer.parameters(recurse=False)):
        raise ValueError(
            f"{name} is on the meta device; load its weights onto a device, or name other layers"
        )


def _calibrate(
    model: nn.Module,
    paths: dict[str, SidePath],
    rank: int,
    seed: int,
    closure: Callable[[], Any],
    mask: str | None,
) -> None:
    """Replaces A of each path by a basis of the inputs of its layer."""
    weights = {f"{name}.{NAME}.down.weight": path.down.weight for name, path in paths.items()}
    for weight in weights.values():
        weight.requires_grad_(True)
    try:
        group = {"params": list(weights.values()), "param_names": list(weights)}
        (watched,) = groups = parameters.trainable([group])
        direction = ActivationSubspace(rank=rank, mask=mask)
        direction.check(model, groups)
        seeds = torch.full((1,), noise.signed(seed), dtype=torch.int64, device=watched.device)
        observer = direction.observer(model, Step(seeds, groups))
        with torch.no_grad(), observer.watching():
            closure()
        frame, finite = observer.frame()
    finally:
        for weight in weights.values():
            weight.requires_grad_(False)
    if not bool(finite):
        raise ValueError("closure: activations of the model are not finite; pass a batch whose loss is")
    bases = [frame.right.get(key) for key in watched.keys]
    for name, basis in zip(paths, bases, strict=True):
        if basis is None:
            raise ValueError(f"closure did not run {name}; pass one that does, or leave it out of names")
    for path, basis in zip(paths.values(), bases, strict=True):
        assert basis is not None
        path.down.weight.data.copy_(basis)
