"""Why a model or a data set cannot be loaded, and what to do about it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from zoext.cli._errors import UserError, first_line, missing_package

#: Exceptions by name: of huggingface_hub, of datasets and of the HTTP clients of their versions.
_NO_ACCESS = frozenset({"GatedRepoError"})
_NOT_FOUND = frozenset({"RepositoryNotFoundError", "DatasetNotFoundError"})
_NO_NAME = frozenset({"HFValidationError"})
_UNREACHABLE = frozenset(
    {
        *("LocalEntryNotFoundError", "OfflineModeIsEnabled"),
        *("ConnectionError", "ConnectError", "ConnectTimeout", "ReadTimeout"),
    }
)


def cannot_load(kind: str, option: str, name: str, error: Exception) -> UserError:
    """What to tell about the model or data set (``kind``) called ``name``, whose loading raised ``error``.

    Args:
        kind: "model" or "data set".
        option: what the message begins with, before the name.
        name: a path, or a name on the hub.
        error: what transformers or datasets raised.
    """
    reason = _of_path(kind, name) or _of_package(error)
    if reason is None and not Path(name).exists():
        reason = _of_hub(kind, error)
    return UserError(f"{option} {name}: {reason or f'cannot be loaded: {first_line(error)}'}")


def _of_path(kind: str, name: str) -> str | None:
    path = Path(name)
    if path.is_file() and kind == "model":
        if path.suffix == ".gguf":
            return None
        return "is a file; give the folder that contains the files of the model"
    has_files = any((path / file).is_file() for file in ("config.json", "adapter_config.json"))
    if path.is_dir() and kind == "model" and not has_files:
        return "contains no config.json; give a folder that save_pretrained of transformers wrote"
    looks_like_one = name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1
    if looks_like_one and not path.exists():
        return f"no such folder; give a folder, or the name of a {kind} on the Hugging Face hub"
    return None


def _of_package(error: Exception) -> str | None:
    if (missing := missing_package(error)) is not None:
        return missing
    advised = re.search(r"pip install [\w.\[\],'-]+", str(error)) if isinstance(error, ImportError) else None
    return None if advised is None else f"{first_line(error).rstrip('.')}: {advised[0]}"


def _of_hub(kind: str, error: Exception) -> str | None:
    names = {type(each).__name__ for each in _chain(error)}
    if names & _NO_ACCESS:
        return (
            f"the Hugging Face hub wants the terms of this {kind} accepted; do so on its page, then: "
            "hf auth login"
        )
    if names & _NO_NAME:
        return f"no such folder, and no name that a {kind} on the Hugging Face hub can have; give one of them"
    if names & _NOT_FOUND:
        return (
            f"no such folder, and the Hugging Face hub has no {kind} of this name; correct it, or, if it is "
            "private: hf auth login"
        )
    if names & _UNREACHABLE:
        for switch in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
            if os.environ.get(switch, "0") not in ("", "0"):
                return (
                    f"no such folder, and {switch} keeps it from being downloaded; unset it, or give a folder"
                )
        return "no such folder, and the Hugging Face hub cannot be reached; connect, or give a folder"
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
