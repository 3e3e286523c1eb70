"""save_pretrained and from_pretrained: a folder, or a repository on the Hugging Face hub, with two files.

config.json           {"model": class name, ...the fields of the config dataclass...}
model.safetensors     the weights, tied tensors once; never pickle
"""

import dataclasses
import json
import typing
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import nn
from torch.overrides import TorchFunctionMode

from .errors import InputError
from .files import write_json, written_whole
from .sharded import is_sharded, whole_state

CONFIG, WEIGHTS = "config.json", "model.safetensors"


class PretrainedModel(nn.Module, PyTorchModelHubMixin, library_name="polymamba"):
    """Base of the models: `config_class` is their config dataclass, and `__init__` takes one."""

    config_class: ClassVar[type]

    def __init__(self, config: Any):
        super().__init__()
        self.config = config

    def save_pretrained(self, save_directory: str | Path, *, model_card_kwargs: dict | None = None, **_: Any) -> None:
        """Write config.json and model.safetensors to a folder, each whole or not at all.

        Of a model whose weights are divided among processes all have to call it, and the first one writes.

        `push_to_hub` (of the mixin) calls this with `model_card_kwargs` and gets a model card as well.
        """
        whole = self.on_one_process()
        if whole is None:
            return
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        with written_whole(folder / WEIGHTS) as beside:
            save_model(whole, str(beside))
        write_json(folder / CONFIG, {"model": type(whole).__name__, **self.describe()})
        if model_card_kwargs is not None:
            self.generate_model_card(**model_card_kwargs).save(folder / "README.md")

    def on_one_process(self) -> nn.Module | None:
        """This model; if its weights are divided among processes, a whole copy on the first, and None on the others."""
        if not is_sharded(self):
            return self
        state = whole_state(self)
        if state is None:
            return None
        with torch.random.fork_rng(devices=[]):  # training draws no other numbers for it
            whole = self.from_description(json.loads(json.dumps(self.describe())))
        whole.load_state_dict(state)
        return whole

    def describe(self) -> dict[str, Any]:
        """What config.json says of the model beside its class; JSON-safe."""
        return dataclasses.asdict(self.config)

    @classmethod
    def from_description(cls, fields: dict[str, Any]) -> Self:
        """The model, with fresh weights, that `describe` spoke of. TypeError or ValueError if that is no such thing."""
        return cls(config_from_dict(cls.config_class, fields))

    @classmethod
    def from_pretrained(cls, path_or_hub_id: str | Path, **hub_options: Any) -> Self:
        """The model in a folder (a run folder, too) or a hub repository, in evaluation mode, on the CPU.

        hub_options go to `hf_hub_download` (revision, token, cache_dir, local_files_only, ...). Raises InputError if
        there is no such model, if it is another kind of model, or if its weights do not fit.
        """
        config_file = fetch(path_or_hub_id, CONFIG, hub_options)
        try:
            fields = json.loads(config_file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{config_file}: not JSON ({error})") from None
        found = fields.pop("model", None) if isinstance(fields, dict) else None
        if found != cls.__name__:
            raise InputError(
                f"{config_file}: holds {found or 'no polymamba model'}, but a {cls.__name__} is wanted here"
            )
        try:
            # Weights are not drawn, which is a third of the time; what some mixers draw is nobody else's.
            with _Undrawn(), torch.random.fork_rng(devices=[]):
                model = cls.from_description(fields)
        except (TypeError, ValueError) as error:
            raise InputError(f"{config_file}: {error}") from None
        weights = fetch(path_or_hub_id, WEIGHTS, hub_options)
        try:
            load_model(model, weights)
        except (SafetensorError, RuntimeError) as error:
            raise InputError(f"{weights}: not the weights of this model ({' '.join(str(error).split())})") from None
        return model.eval()


class _Undrawn(TorchFunctionMode):
    """Within it `nn.init` leaves weights as they come: they are read from a file."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") not in ("normal_", "uniform_", "kaiming_uniform_", "trunc_normal_"):
            return func(*args, **kwargs)
        return args[0] if args else kwargs["tensor"]


def model_name(folder: Path) -> str | None:
    """The class of the model in a folder, as its config.json says; None if it does not."""
    try:
        return json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("model")
    except (OSError, ValueError, AttributeError):
        return None  # from_pretrained says what is wrong


def config_from_dict(config_class: type, fields: dict[str, Any]) -> Any:
    """A config dataclass from its JSON form, nested dataclasses included. TypeError names an unknown field."""
    hints = typing.get_type_hints(config_class)
    return config_class(
        **{
            name: config_from_dict(hints[name], value) if dataclasses.is_dataclass(hints.get(name)) else value
            for name, value in fields.items()
        }
    )


def fetch(path_or_hub_id: str | Path, name: str, hub_options: dict[str, Any]) -> Path:
    """A model's file: in its folder, or downloaded from the hub. Raises InputError if there is none."""
    folder = Path(path_or_hub_id)
    if folder.is_dir():
        if not (folder / name).is_file():
            raise InputError(f"{folder}: no {name} in this folder; a model's folder holds {CONFIG} and {WEIGHTS}")
        return folder / name
    if folder.exists():
        raise InputError(f"{folder}: a file; expected a model's folder, which holds {CONFIG} and {WEIGHTS}")
    try:
        return Path(hf_hub_download(str(path_or_hub_id), name, **hub_options))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path_or_hub_id}: neither a folder here nor a model on the hub ({reason})") from None
