"""Writes side paths as a LoRA adapter of PEFT."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from zoext._engine import merge_all
from zoext._parameters import shards, wrappers
from zoext._runtime import atomic
from zoext.side_paths import NAME, SidePath, paths_of

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def export_adapter(model: nn.Module, folder: str | Path, *, replace: bool = False) -> Path:
    """Writes the side paths of a model as a LoRA adapter, which PEFT loads onto the same base.

        zoext.export_adapter(model, "adapter")
        tuned = peft.PeftModel.from_pretrained(base, "adapter")

    A is ``lora_A``, B is ``lora_B``, and ``lora_alpha`` equals the rank, so the outputs are the same to
    rounding. The factors keep their dtype, float32 unless the model was cast. PEFT is not needed here. Steps
    that ``LowRank(defer=True)`` holds back are merged before, also in the model.

    Args:
        model: a model with side paths, see ``attach_side_paths``.
        folder: gets ``adapter_config.json`` and ``adapter_model.safetensors``. It is complete or absent at
            every moment, also if the process is killed.
        replace: whether to replace the folder if it exists and holds only an adapter. Default False.

    Returns:
        The folder.

    Raises:
        ValueError: for a model without side paths, other trainable parameters, which the adapter would lack,
            and weights that are not finite, sharded or on the meta device. Nothing is then written.
        RuntimeError: within a closure of an optimizer that holds steps back.
        FileExistsError: if the folder exists, or has other files.
        ImportError: if safetensors is not installed.
    """
    from safetensors.torch import save_file

    folder, model = Path(folder), wrappers.unwrapped(model)
    paths = paths_of(model)
    _check(model, paths)
    _check_folder(folder, replace)
    merge_all(weight for path in paths.values() for weight in path.parameters())
    rank = max(path.rank for path in paths.values())
    tensors = {}
    for name, path in paths.items():
        # PEFT has one rank for all layers; rows of zeros add nothing.
        missing = rank - path.rank
        down, up = (each.weight.detach().cpu() for each in (path.down, path.up))
        tensors[f"base_model.model.{name}.lora_A.weight"] = pad(down, (0, 0, 0, missing)).contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = pad(up, (0, missing)).contiguous()
    config = json.dumps(_config(model, list(paths), rank), indent=2, sort_keys=True) + "\n"
    with atomic.new_folder(folder, replace=replace) as temporary:
        save_file(tensors, str(temporary / _WEIGHTS), metadata={"format": "pt"})
        (temporary / _CONFIG).write_text(config, encoding="utf-8")
    return folder


def _config(model: nn.Module, names: Sequence[str], rank: int) -> dict[str, Any]:
    layers = dict(model.named_modules())
    base = getattr(getattr(model, "config", None), "_name_or_path", "")
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base or None,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": all(isinstance(layers[name], wrappers.conv1d()) for name in names),
        "target_modules": _targets(layers, names),
        "inference_mode": True,
    }


def _targets(layers: Mapping[str, nn.Module], names: Sequence[str]) -> list[str] | str:
    """What PEFT finds the layers by: their last parts if no other module has these, else an expression."""
    ends = sorted({name.rpartition(".")[2] for name in names})
    own = tuple(f".{NAME}.{part}" for part in ("down", "up"))
    found = {name for name in layers if name.rpartition(".")[2] in ends and not f".{name}".endswith(own)}
    return ends if found == set(names) else "|".join(map(re.escape, names))


def _check(model: nn.Module, paths: Mapping[str, SidePath]) -> None:
    if not paths:
        kind = "; save adapters of PEFT with model.save_pretrained" if hasattr(model, "peft_config") else ""
        raise ValueError(f"model has no side paths; add them with zoext.attach_side_paths(model){kind}")
    if "" in paths:
        raise ValueError(
            "model is the layer itself, which an adapter cannot name; export the model that it is in"
        )
    own = {id(weight) for path in paths.values() for weight in path.parameters()}
    others = [name for name, each in model.named_parameters() if each.requires_grad and id(each) not in own]
    if others:
        shown = ", ".join(others[:3]) + (f" and {len(others) - 3} more" if len(others) > 3 else "")
        raise ValueError(
            f"model has trainable parameters that the adapter would lack: {shown}; save them yourself, and "
            "freeze them with requires_grad_(False)"
        )
    for name, path in paths.items():
        for part in (path.down, path.up):
            _check_weight(name, part.weight)


def _check_weight(name: str, weight: Tensor) -> None:
    if shards.is_distributed(weight):
        raise ValueError(f"{name}: its side path is sharded, and this process holds a part; gather it first")
    if weight.is_meta:
        raise ValueError(
            f"{name}: its side path is on the meta device, where it has no values; load it first"
        )
    if not bool(torch.isfinite(weight).all()):
        raise ValueError(f"{name}: its side path has values that are not finite; go back to an earlier state")


def _check_folder(folder: Path, replace: bool) -> None:
    if not folder.exists():
        return
    if not replace:
        raise FileExistsError(f"{folder} exists; pass another folder, or replace=True")
    others = [each.name for each in folder.iterdir()] if folder.is_dir() else [folder.name]
    others = sorted(set(others) - {_CONFIG, _WEIGHTS, "README.md"})
    if others:
        raise FileExistsError(
            f"{folder} has files that are no adapter: {', '.join(others[:3])}; pass another folder"
        )
