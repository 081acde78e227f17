"""Trained weights as files: safetensors, which holds numbers and nothing that could run."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

#: How torch calls the extra state of a module.
_EXTRA = "_extra_state"


def weights_module() -> ModuleType:
    """`safetensors.torch`, an extra.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import safetensors.torch
    except ModuleNotFoundError as error:
        raise ValueError(
            "train.save_weights=true: safetensors is not installed; pip install 'reformer-harness[weights]'"
        ) from error
    module: ModuleType = safetensors.torch
    return module


def keep_weights(model: nn.Module, path: Path) -> None:
    """Write the parameters and buffers of a model, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in _flat(model.state_dict())}
    try:
        weights_module().save_file(state, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _flat(state: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors by name; a module's extra state is a mapping of some (the counter of hash draws)."""
    for name, value in state.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}.{key}", tensor) for key, tensor in value.items())
        else:
            yield name, value


def _nested(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    state: dict[str, Any] = {}
    for name, tensor in tensors.items():
        owner, extra, key = name.partition(f"{_EXTRA}.")
        if extra:
            state.setdefault(f"{owner}{_EXTRA}", {})[key] = tensor
        else:
            state[name] = tensor
    return state


def load_weights(model: nn.Module, path: Path) -> None:
    """Give a model the weights of that file.

    Raises:
        ValueError: there are none, or they are another model's.
    """
    try:
        state: dict[str, torch.Tensor] = weights_module().load_file(path)
        model.load_state_dict(_nested(state))
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{path}: no weights of this model ({' '.join(str(error).split())})") from error
    except Exception as error:  # safetensors raises an error of its own for what is no such file
        raise ValueError(f"{path}: no file of weights ({error})") from error
