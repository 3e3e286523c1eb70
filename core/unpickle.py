"""Official checkpoints as their training scripts left them, read without running any code of theirs.

A .pth file is a pickle, which may name any function and have it called. Here only what rebuilds tensors is called;
every other name becomes a `StandIn`, which does nothing but keep what the pickle puts into it. So the settings that
scripts save beside the weights (argparse.Namespace, yacs.config.CfgNode, ...) can be read, whatever they are, and a
malicious file can do no more than hold nonsense.
"""

import pickle  # noqa: TID251 - its reader, which finds no class or function but those below
import zipfile
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import InputError

# Of these modules' names, those that pickles of tensors use; all are harmless to call.
_ALLOWED = {
    "collections": {"OrderedDict"},
    "torch": {
        "Size",
        "device",
        *(str(d).removeprefix("torch.") for d in vars(torch).values() if type(d) is torch.dtype),
    },
    "torch._utils": {"_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter"},
}


class StandIn(dict):
    """An object of a class that is not run: its items, and its attributes as items."""

    name = ""

    def __new__(cls, *args: Any, **kwargs: Any) -> "StandIn":
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        for part in state if isinstance(state, tuple) else (state,):
            if isinstance(part, Mapping):
                self.update(part)

    def append(self, item: Any) -> None:
        self[len(self)] = item

    def extend(self, items: Any) -> None:
        for item in items:
            self.append(item)

    add = append


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _ALLOWED.get(module, ()):
            return getattr(import_module(module), name)
        return type("StandIn", (StandIn,), {"name": f"{module}.{name}"})


class _PickleModule:
    """What torch.load takes for the module `pickle`."""

    Unpickler = _Unpickler

    @staticmethod
    def load(file: Any, **options: Any) -> Any:
        return _Unpickler(file, **options).load()


def read_pickled(path: Path) -> Any:
    """The content of a .pth file. Raises InputError if it is no such file, or a damaged one."""
    try:
        if zipfile.is_zipfile(path) and any(n.endswith("constants.pkl") for n in zipfile.ZipFile(path).namelist()):
            raise InputError(f"{path}: a TorchScript program, which is not run; a checkpoint of tensors is needed")
        # torch adds storages, which it makes itself, to what _Unpickler knows.
        return torch.load(path, map_location="cpu", pickle_module=_PickleModule, weights_only=False)
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    except Exception as error:  # what a damaged or foreign pickle raises is anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise InputError(f"{path}: not a checkpoint that torch saved, or a damaged one ({reason})") from None


def tensors_of(content: Any, choice: str | None, path: Path) -> tuple[dict[str, Tensor], str]:
    """The state dict in a checkpoint, and the name of the entry that it was found in ("" if it is all there is).

    choice   the entry to take, such as model or model_ema; may be None if there is no choice
    Raises InputError if there are several and none was chosen, or if the one chosen is not there.
    """
    if _is_state_dict(content):
        if choice:
            raise InputError(f"{path}: holds one set of weights and no {choice!r}; leave --weights out")
        return dict(content), ""
    entries = content if isinstance(content, Mapping) else {}
    found = {str(name): value for name, value in entries.items() if _is_state_dict(value)}
    if not found:
        raise InputError(f"{path}: holds no state dict of tensors")
    if choice is None and len(found) > 1:
        raise InputError(f"{path}: holds weights {', '.join(sorted(found))}; say which with --weights")
    choice = choice or next(iter(found))
    if choice not in found:
        raise InputError(f"{path}: holds no weights {choice!r}; there are {', '.join(sorted(found))}")
    return dict(found[choice]), choice


def _is_state_dict(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(isinstance(v, Tensor) for v in value.values())
