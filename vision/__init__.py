"""Images: Vim and VMamba, trained, served, and known to timm.

Importing this package makes `timm.create_model` know their names: at once if timm is loaded already, else as soon as
it is. So the command line need not wait for timm, nor for torch, before it can answer.
"""

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import VimConfig, VMambaConfig, preset_config
    from .model import ImageModel, load_image_model
    from .official import from_vim, from_vmamba
    from .vim import Vim
    from .vmamba import VMamba

_MODULE_OF = {
    "ImageModel": "model",
    "VMamba": "vmamba",
    "VMambaConfig": "config",
    "Vim": "vim",
    "VimConfig": "config",
    "from_vim": "official",
    "from_vmamba": "official",
    "load_image_model": "model",
    "preset_config": "config",
}

__all__ = [
    "ImageModel",
    "VMamba",
    "VMambaConfig",
    "Vim",
    "VimConfig",
    "from_vim",
    "from_vmamba",
    "load_image_model",
    "preset_config",
]


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _RegisterAfterTimm(MetaPathFinder):
    """Waits until timm is imported, not only looked for, lets it run, and registers the models."""

    looking = False

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname != "timm" or self.looking:
            return None
        self.looking = True
        try:
            spec = find_spec("timm")  # as if this finder were not there
        finally:
            self.looking = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Then(spec.loader, self)
        return spec


class _Then(Loader):
    def __init__(self, timms: Loader, finder: _RegisterAfterTimm):
        self.timms, self.finder = timms, finder

    def create_module(self, spec: ModuleSpec) -> Any:
        return self.timms.create_module(spec)

    def exec_module(self, module: Any) -> None:
        sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not self.finder]
        module.__spec__.loader = module.__loader__ = self.timms
        self.timms.exec_module(module)
        import_module(".registry", __name__)


if "timm" in sys.modules:
    import_module(".registry", __name__)
else:
    sys.meta_path.insert(0, _RegisterAfterTimm())
