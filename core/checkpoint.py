"""All that a killed run needs to go on to the same numbers, as a folder of safetensors and JSON: never pickle.

model.safetensors, average.safetensors   the weights, and their moving average if there is one
optimizer.safetensors                    what the optimizer keeps of parameter i, as `i.name`
state.json                               where training stands, and the random states of each process
"""

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn

from .errors import InputError
from .files import write_text, written_whole

OPTIMIZER, STATE = "optimizer.safetensors", "state.json"


def save(folder: Path, modules: Mapping[str, nn.Module], optimizer: Any, position: dict, random_states: list) -> None:
    """Fill `folder`. modules: name -> module; position: JSON-safe. Raises OSError if it cannot be written."""
    for name, module in modules.items():
        with written_whole(folder / f"{name}.safetensors") as beside:
            save_model(module, str(beside))
    kept = optimizer.state_dict()["state"]
    with written_whole(folder / OPTIMIZER) as beside:
        save_file({f"{i}.{name}": value for i, values in kept.items() for name, value in values.items()}, beside)
    write_text(folder / STATE, json.dumps({"position": position, "random": random_states}))


def load(
    folder: Path, modules: Mapping[str, nn.Module], optimizer: Any, device: torch.device, process: int
) -> dict[str, Any]:
    """Restore modules, optimizer and the random states of this process; returns the position.

    Raises InputError if a file is missing, damaged or of another run.
    """
    try:
        for name, module in modules.items():
            load_model(module, folder / f"{name}.safetensors")
        kept: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in load_file(folder / OPTIMIZER).items():
            number, name = key.split(".")
            kept.setdefault(int(number), {})[name] = value
        optimizer.load_state_dict({**optimizer.state_dict(), "state": kept})
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        _restore_random_states(state["random"][process], device)
        return state["position"]
    except (OSError, ValueError, LookupError, TypeError, RuntimeError, SafetensorError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise InputError(f"{folder}: a damaged checkpoint ({reason}); begin anew in another folder") from None


def random_states(device: torch.device) -> list[dict[str, Any]]:
    """The states of all random generators, JSON-safe, of each process in turn. Every process has to call it."""
    of_numpy = np.random.get_state(legacy=False)
    of_numpy["state"]["key"] = of_numpy["state"]["key"].tolist()
    states = {"python": random.getstate(), "numpy": of_numpy, "torch": torch.get_rng_state().tolist()}
    if device.type != "cpu":
        states["device"] = torch.get_device_module(device).get_rng_state().tolist()
    return gather_object([states])


def _restore_random_states(states: dict[str, Any], device: torch.device) -> None:
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    states["numpy"]["state"]["key"] = np.array(states["numpy"]["state"]["key"], dtype=np.uint32)
    np.random.set_state(states["numpy"])
    torch.set_rng_state(torch.tensor(states["torch"], dtype=torch.uint8))
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(torch.tensor(states["device"], dtype=torch.uint8))
