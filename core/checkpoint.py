"""All that a killed run needs to go on to the same numbers, as a folder of safetensors and JSON: never pickle.

model.safetensors, average.safetensors   the weights, and their moving average if there is one
optimizer.safetensors                    what the optimizer keeps of parameter i, as `i.name`
state.json                               where training stands, and the random states of each process

Where weights are divided among processes each of n writes a file of its own, model-00001-of-0000n.safetensors, with
every n-th tensor, whole: so any number of processes can read them, and to put them together is to take all files.
"""

import json
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from . import processes
from .errors import InputError
from .files import write_text, written_whole
from .sharded import here, is_part, is_sharded

OPTIMIZER, STATE = "optimizer", "state.json"


def save(folder: Path, modules: Mapping[str, nn.Module], optimizer: Any, position: dict, random_states: list) -> None:
    """Fill `folder`. modules: name -> module; position: JSON-safe. Raises OSError if it cannot be written.

    Every process has to call it.
    """
    divided = any(map(is_sharded, modules.values()))
    for name, module in modules.items():
        _write(folder, name, {names[0]: tensor for names, tensor in _tensors_of(module)}, divided)
    kept = optimizer.state_dict()["state"]
    _write(folder, OPTIMIZER, {f"{i}.{name}": value for i, s in kept.items() for name, value in s.items()}, divided)
    if processes.is_first():
        write_text(folder / STATE, json.dumps({"position": position, "random": random_states}))


def load(folder: Path, modules: Mapping[str, nn.Module], optimizer: Any, device: torch.device) -> dict[str, Any]:
    """Restore modules, optimizer and the random states of this process; returns the position.

    There may be more or fewer processes than when it was saved: of more, the new ones keep their random states.
    Raises InputError if a file is missing, damaged or of another run.
    """
    try:
        for name, module in modules.items():
            _fill(folder, name, _tensors_of(module))
        _fill_optimizer(folder, optimizer)
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        if processes.rank() < len(state["random"]):
            _restore_random_states(state["random"][processes.rank()], device)
        return state["position"]
    except (OSError, ValueError, LookupError, TypeError, RuntimeError, SafetensorError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise InputError(f"{folder}: a damaged checkpoint ({reason}); begin anew in another folder") from None


def _tensors_of(module: nn.Module) -> list[tuple[list[str], Tensor]]:
    """Each tensor of the state once, with its names, of which one that is tied has several."""
    found: dict[int, tuple[list[str], Tensor]] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        found.setdefault(id(tensor), ([], tensor))[0].append(name)
    return list(found.values())


def _write(folder: Path, name: str, tensors: Mapping[str, Any], divided: bool) -> None:
    n = processes.count() if divided else 1
    own: dict[str, Tensor] = {}
    for i, (key, tensor) in enumerate(tensors.items()):
        whole = tensor.detach().full_tensor() if is_part(tensor) else tensor.detach()  # which all processes make
        if i % n == (processes.rank() if divided else 0):
            own[key] = whole.cpu().contiguous()
    if divided or processes.is_first():
        part = f"-{processes.rank() + 1:05d}-of-{n:05d}" if divided else ""
        with written_whole(folder / f"{name}{part}.safetensors") as beside:
            save_file(own, beside)


def _read(folder: Path, name: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a file, or of all its parts."""
    files = sorted(folder.glob(f"{name}-*-of-*.safetensors")) or [folder / f"{name}.safetensors"]
    n_files = int(files[0].stem.rpartition("-")[2]) if "-of-" in files[0].stem else 1
    if len(files) != n_files:
        raise FileNotFoundError(f"{n_files - len(files)} of {n_files} files of {name} are missing")
    for file in files:
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - no mapping
                yield key, tensors.get_tensor(key)


def _fill(folder: Path, name: str, wanted: list[tuple[list[str], Tensor]]) -> None:
    target = {key: tensor for keys, tensor in wanted for key in keys}
    filled = set()
    for key, value in _read(folder, name):
        _copy(value, target[key], key)
        filled.add(id(target[key]))
    missing = [keys[0] for keys, tensor in wanted if id(tensor) not in filled]
    if missing:
        raise KeyError(f"{name} has no {missing[0]}")


def _copy(value: Tensor, into: Any, key: str) -> None:
    if value.shape != into.shape:
        raise ValueError(f"{key} has shape {tuple(value.shape)}; expected {tuple(into.shape)}")
    with torch.no_grad():
        here(into).copy_(_part_like(value, into))


def _part_like(value: Tensor, like: Any) -> Tensor:
    """What of a whole tensor is on this process where `like` is divided."""
    if not is_part(like):
        return value
    from torch.distributed.tensor import distribute_tensor

    moved = value.to(like.to_local().device)
    return distribute_tensor(moved, like.device_mesh, like.placements, src_data_rank=None).to_local()


def _fill_optimizer(folder: Path, optimizer: Any) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    kept: dict[int, dict[str, Any]] = {}
    for key, value in _read(folder, OPTIMIZER):
        number, name = key.split(".")
        parameter = parameters[int(number)]
        if value.shape == parameter.shape:
            into = torch.zeros_like(parameter, dtype=value.dtype)
            _copy(value, into, key)
            value = into.detach()
        kept.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": kept})


def random_states(device: torch.device) -> list[dict[str, Any]]:
    """The states of all random generators, JSON-safe, of each process in turn. Every process has to call it."""
    of_numpy = np.random.get_state(legacy=False)
    of_numpy["state"]["key"] = of_numpy["state"]["key"].tolist()
    states = {"python": random.getstate(), "numpy": of_numpy, "torch": torch.get_rng_state().tolist()}
    if device.type != "cpu":
        states["device"] = torch.get_device_module(device).get_rng_state().tolist()
    return processes.everyones(states)


def _restore_random_states(states: dict[str, Any], device: torch.device) -> None:
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    states["numpy"]["state"]["key"] = np.array(states["numpy"]["state"]["key"], dtype=np.uint32)
    np.random.set_state(states["numpy"])
    torch.set_rng_state(torch.tensor(states["torch"], dtype=torch.uint8))
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(torch.tensor(states["device"], dtype=torch.uint8))
