"""The models' names in timm: `timm.create_model("vim_tiny_patch16_224")` and the others of config.py.

Loaded when timm is there (see __init__.py); the models themselves load when one is made.
"""

from dataclasses import asdict
from typing import Any

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from .config import INPUT_SIZES, PRESETS, VimConfig

__all__: list[str] = []  # timm adds the names


def _default_cfg(name: str) -> dict[str, Any]:
    size, config = INPUT_SIZES[name], PRESETS[name]
    is_vim = isinstance(config, VimConfig)
    reduction = config.step if isinstance(config, VimConfig) else config.patch_size * 2 ** (len(config.depths) - 1)
    return {
        "url": "",
        "num_classes": config.num_classes,
        "input_size": (3, size, size),
        "pool_size": None if is_vim else (-(-size // reduction),) * 2,
        "crop_pct": 0.875 if size >= 128 else 1.0,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj" if is_vim else "patch_embed.conv1",
        "classifier": "head" if is_vim else "head.fc",
        "license": "apache-2.0",
    }


default_cfgs = generate_default_cfgs({name: _default_cfg(name) for name in PRESETS})


def _create(name: str, pretrained: bool, kwargs: dict[str, Any]) -> Any:
    from .official import to_our_keys
    from .vim import Vim
    from .vmamba import VMamba

    preset = PRESETS[name]
    model: Any = Vim if isinstance(preset, VimConfig) else VMamba
    n_features = preset.depth if isinstance(preset, VimConfig) else len(preset.depths)
    # A token model has features of one scale: timm's default is the last ones.
    indices = tuple(range(-min(n_features, 4), 0)) if isinstance(preset, VimConfig) else tuple(range(n_features))
    return build_model_with_cfg(
        lambda **given: model(type(preset)(**{**asdict(preset), **given})),
        name,
        pretrained,
        pretrained_filter_fn=to_our_keys,
        feature_cfg={"out_indices": indices, "feature_cls": "getter"},
        **kwargs,
    )


def _register(name: str) -> None:
    def entry(pretrained: bool = False, **kwargs: Any) -> Any:
        return _create(name, pretrained, kwargs)

    entry.__name__ = entry.__qualname__ = name
    entry.__doc__ = f"{name}: see config.py."
    globals()[name] = register_model(entry)


for _name in PRESETS:
    _register(_name)
