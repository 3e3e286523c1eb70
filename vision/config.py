"""Shapes of the two architectures, their published sizes, and recipes to train them.

Free of torch: the command line is parsed before it loads. Names of sizes are timm's (registry.py).
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

from ..core.config import TrainConfig
from ..core.inputs import require_fractions

TOKENS = ("middle", "head", "double", "none")
VIM_POOLS = ("token", "avg", "max", "last", "")
VMAMBA_POOLS = ("avg", "max", "")


def _require_one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, allowed))}")


def _require_at_least(config: Any, lowest: int, *names: str) -> None:
    for name in names:
        if getattr(config, name) < lowest:
            raise ValueError(f"{name} is {getattr(config, name)}; it must be at least {lowest}")


def _require_share(config: Any, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(f"{name} is {getattr(config, name)}; it must be at least 0 and below 1")


@dataclass(frozen=True, kw_only=True)
class VimConfig:
    """Vision Mamba (arXiv 2401.09417): patches as one sequence, scanned in both directions."""

    img_size: tuple[int, int] = (224, 224)  # height, width; an int for both. Other sizes resize the positions
    patch_size: int = 16
    stride: int | None = None  # pixels between patches; None: patch_size, so that they do not overlap
    in_chans: int = 3
    num_classes: int = 1000  # 0: features instead of logits
    embed_dim: int = 192
    depth: int = 24
    d_state: int = 16
    class_token: str = "middle"  # where it stands, one of TOKENS; double: one at each end
    global_pool: str = "token"  # one of VIM_POOLS; what is not `token` is taken over the patches
    divide_out: bool = True  # the mean of the two directions instead of their sum
    drop_rate: float = 0.0  # dropout before the head
    drop_path_rate: float = 0.0  # stochastic depth of the last block; from 0 it grows linearly

    def __post_init__(self) -> None:
        size = (self.img_size, self.img_size) if isinstance(self.img_size, int) else tuple(self.img_size)
        object.__setattr__(self, "img_size", size)
        if self.stride == self.patch_size:
            object.__setattr__(self, "stride", None)
        _require_at_least(self, 1, "patch_size", "in_chans", "embed_dim", "depth", "d_state", "step")
        _require_at_least(self, 0, "num_classes")
        _require_share(self, "drop_rate", "drop_path_rate")
        _require_one_of("class_token", self.class_token, TOKENS)
        _require_one_of("global_pool", self.global_pool, VIM_POOLS)
        if self.global_pool == "token" and self.class_token == "none":
            raise ValueError("global_pool is 'token', but class_token is 'none'; use 'avg', 'max' or 'last'")
        if len(size) != 2 or min(size) < self.patch_size:
            raise ValueError(f"img_size is {self.img_size}; it needs a height and a width of at least a patch's side")

    @property
    def step(self) -> int:
        """Pixels from one patch to the next."""
        return self.patch_size if self.stride is None else self.stride

    @property
    def n_tokens(self) -> int:
        """Class tokens."""
        return {"none": 0, "double": 2}.get(self.class_token, 1)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Patches down and across; pixels beyond the last whole patch are not seen."""
        return tuple((side - self.patch_size) // self.step + 1 for side in (height, width))  # pyright: ignore


@dataclass(frozen=True, kw_only=True)
class VMambaConfig:
    """VMamba (arXiv 2401.10166): four stages of 2-D scans at falling resolution; the channels double each time.

    The defaults are those of the published "v05_noz" models; V0 below makes them those of the first version.
    """

    patch_size: int = 4  # stride of the stem: 4, or 2 for small images
    in_chans: int = 3
    num_classes: int = 1000  # 0: features instead of logits
    depths: tuple[int, ...] = (2, 2, 8, 2)
    embed_dim: int = 96  # channels of the first stage
    d_state: int = 1
    ssm_ratio: float = 1.0  # inner width of the scan / channels
    mlp_ratio: float = 4.0  # inner width of the MLP / channels; 0 for none
    gate: bool = False  # multiply the scan's result by silu of a second projection
    conv_bias: bool = False  # of the depthwise convolution before the scan
    stem: str = "conv"  # two 3 x 3 convolutions, or "patch": one of the patch's size
    downsample: str = "conv"  # 3 x 3 of stride 2, or "merge": 2 x 2 pixels put side by side (Swin)
    global_pool: str = "avg"  # one of VMAMBA_POOLS
    drop_rate: float = 0.0  # dropout before the head
    drop_path_rate: float = 0.0  # stochastic depth of the last block; from 0 it grows linearly

    def __post_init__(self) -> None:
        object.__setattr__(self, "depths", tuple(self.depths))  # JSON gives a list
        _require_one_of("patch_size", self.patch_size, (2, 4))
        _require_one_of("stem", self.stem, ("conv", "patch"))
        _require_one_of("downsample", self.downsample, ("conv", "merge"))
        _require_one_of("global_pool", self.global_pool, VMAMBA_POOLS)
        _require_at_least(self, 1, "in_chans", "embed_dim", "d_state")
        _require_at_least(self, 0, "num_classes", "mlp_ratio")
        _require_share(self, "drop_rate", "drop_path_rate")
        if not self.depths or min(self.depths) < 1:
            raise ValueError(f"depths is {self.depths}; give each stage at least one block")
        if self.ssm_ratio <= 0 or self.embed_dim % 2:
            raise ValueError(f"ssm_ratio ({self.ssm_ratio}) must be above 0 and embed_dim ({self.embed_dim}) even")

    @property
    def dims(self) -> tuple[int, ...]:
        """Channels of each stage."""
        return tuple(self.embed_dim * 2**i for i in range(len(self.depths)))


V0: dict[str, Any] = {
    "ssm_ratio": 2.0,
    "d_state": 16,
    "mlp_ratio": 0.0,
    "gate": True,
    "conv_bias": True,
    "stem": "patch",
    "downsample": "merge",
}
_S2: dict[str, Any] = {"ssm_ratio": 2.0}
_SMALL: dict[str, Any] = {"img_size": (32, 32), "patch_size": 4, "num_classes": 10}

VIM_PRESETS: dict[str, VimConfig] = {
    "vim_tiny_patch16_224": VimConfig(),
    "vim_small_patch16_224": VimConfig(embed_dim=384),
    "vim_base_patch16_224": VimConfig(embed_dim=768),
    "vim_tiny_patch16_stride8_224": VimConfig(stride=8),
    "vim_small_patch16_stride8_224": VimConfig(embed_dim=384, stride=8),
    # for small images; ours, not of the paper
    "vim_tiny_patch4_32": VimConfig(depth=12, drop_path_rate=0.1, **_SMALL),
    "vim_micro_patch4_32": VimConfig(embed_dim=96, depth=6, d_state=8, **_SMALL),
    "test_vim": VimConfig(img_size=(64, 64), patch_size=8, embed_dim=32, depth=4, d_state=4),
}
VMAMBA_PRESETS: dict[str, VMambaConfig] = {
    "vmamba_tiny_s1l8": VMambaConfig(drop_path_rate=0.2),
    "vmamba_tiny_s2l5": VMambaConfig(depths=(2, 2, 5, 2), drop_path_rate=0.2, **_S2),
    "vmamba_small_s1l20": VMambaConfig(depths=(2, 2, 20, 2), drop_path_rate=0.3),
    "vmamba_small_s2l15": VMambaConfig(depths=(2, 2, 15, 2), drop_path_rate=0.3, **_S2),
    "vmamba_base_s1l20": VMambaConfig(depths=(2, 2, 20, 2), embed_dim=128, drop_path_rate=0.5),
    "vmamba_base_s2l15": VMambaConfig(depths=(2, 2, 15, 2), embed_dim=128, drop_path_rate=0.6, **_S2),
    "vmamba_tiny_v0": VMambaConfig(depths=(2, 2, 9, 2), drop_path_rate=0.2, **V0),
    "vmamba_small_v0": VMambaConfig(depths=(2, 2, 27, 2), drop_path_rate=0.3, **V0),
    "vmamba_base_v0": VMambaConfig(depths=(2, 2, 27, 2), embed_dim=128, drop_path_rate=0.5, **V0),
    # for small images; ours, not of the paper
    "vmamba_tiny_patch2_32": VMambaConfig(
        patch_size=2, num_classes=10, depths=(2, 4, 2), embed_dim=64, drop_path_rate=0.1
    ),
    "vmamba_micro_patch2_32": VMambaConfig(patch_size=2, num_classes=10, depths=(1, 2, 1), embed_dim=32),
    "test_vmamba": VMambaConfig(depths=(1, 1, 2, 1), embed_dim=8),
}
PRESETS: dict[str, VimConfig | VMambaConfig] = {**VIM_PRESETS, **VMAMBA_PRESETS}
INPUT_SIZES = {
    **{name: max(config.img_size) for name, config in VIM_PRESETS.items()},
    **{name: 32 if name.endswith("_32") else 224 for name in VMAMBA_PRESETS},
    "test_vmamba": 64,
}


def preset_config(name: str, **changes: Any) -> VimConfig | VMambaConfig:
    """The configuration of this name with some fields changed. TypeError for a field that it does not have."""
    if name not in PRESETS:
        raise ValueError(f"model {name!r} is not one of {', '.join(PRESETS)}")
    return replace(PRESETS[name], **changes)


@dataclass(frozen=True, kw_only=True)
class Dividing:
    """Dividing images into train, valid and test. Parts that the data names stay; others are taken from train."""

    valid_fraction: float = 0.1
    """Share of the training images set aside for validation, if the data names no validation part."""
    test_fraction: float = 0.1
    """Share of the training images set aside for the final test, if the data names no test part; 0 for none."""

    def __post_init__(self) -> None:
        require_fractions(self.valid_fraction, self.test_fraction)


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """What is done to a training image (timm's transforms) and to a batch of them."""

    scale: float = 0.6  # smallest share of an image's area that a random crop keeps
    flip: float = 0.5  # share of images that are mirrored left to right
    jitter: float = 0.3  # of brightness, contrast and saturation, where auto_augment is ""
    auto_augment: str = ""  # timm's name of a policy, such as rand-m9-mstd0.5-inc1
    erase: float = 0.1  # share of images of which a rectangle is erased
    mixup: float = 0.0  # alpha of mixup; 0 for none
    cutmix: float = 0.0  # alpha of cutmix; 0 for none. With both, a batch gets one of the two
    smoothing: float = 0.1  # of the labels

    def __post_init__(self) -> None:
        if not 0 < self.scale <= 1 or not 0 <= self.smoothing < 1:
            raise ValueError(f"scale ({self.scale}) must be above 0, at most 1; smoothing ({self.smoothing}) below 1")
        for name in ("flip", "erase"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be between 0 and 1")
        for name in ("jitter", "mixup", "cutmix"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train for one purpose."""

    train: TrainConfig
    augment: Augmentation


_DEIT = Augmentation(
    scale=0.08, flip=0.5, auto_augment="rand-m9-mstd0.5-inc1", erase=0.25, mixup=0.8, cutmix=1.0, smoothing=0.1
)
# The official ones for ImageNet are of 1024 images a step, with lr 1e-3; here of a batch of 128, lr in proportion.
RECIPES = {
    "small-image": Recipe(
        train=TrainConfig(epochs=30, batch_size=64, lr=2e-3, warmup=0.1, weight_decay=0.05, clip=1.0, ema=0.99),
        augment=Augmentation(),
    ),
    "vim": Recipe(
        train=TrainConfig(epochs=300, batch_size=128, lr=1.25e-4, warmup=5 / 300, weight_decay=0.1, ema=0.99996),
        augment=_DEIT,
    ),
    "vmamba": Recipe(
        train=TrainConfig(
            epochs=300, batch_size=128, lr=1.25e-4, warmup=20 / 300, weight_decay=0.05, clip=5.0, ema=0.9999
        ),
        augment=_DEIT,
    ),
    "finetune": Recipe(
        train=TrainConfig(epochs=20, batch_size=64, lr=2e-4, warmup=0.1, weight_decay=0.05, clip=1.0, ema=0.995),
        augment=Augmentation(scale=0.35, auto_augment="rand-m7-mstd0.5-inc1"),
    ),
}
RecipeName = Literal["small-image", "vim", "vmamba", "finetune"]
ModelName = Literal[
    "vim_tiny_patch16_224", "vim_small_patch16_224", "vim_base_patch16_224", "vim_tiny_patch16_stride8_224",
    "vim_small_patch16_stride8_224", "vim_tiny_patch4_32", "vim_micro_patch4_32", "test_vim", "vmamba_tiny_s1l8",
    "vmamba_tiny_s2l5", "vmamba_small_s1l20", "vmamba_small_s2l15", "vmamba_base_s1l20", "vmamba_base_s2l15",
    "vmamba_tiny_v0", "vmamba_small_v0", "vmamba_base_v0", "vmamba_tiny_patch2_32", "vmamba_micro_patch2_32",
    "test_vmamba",
]  # fmt: skip
