"""`polymamba vision <verb>`: the flags of each verb. What the verbs do is in verbs/, loaded when one runs."""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from tyro.conf import OmitArgPrefixes, Positional

from ..core.config import ComputeConfig, TrainConfig
from ..core.flags import OptionalOutput, Output
from .config import RECIPES, Augmentation, Dividing, ModelName, RecipeName


def _require_at_least(flags: Any, lowest: int, *names: str) -> None:
    for name in names:
        value = getattr(flags, name)
        if value is not None and value < lowest:
            raise ValueError(f"{name} is {value}; it must be at least {lowest}")


def _given(flags: Any) -> dict[str, Any]:
    """The fields that are not left to the recipe."""
    return {f.name: getattr(flags, f.name) for f in fields(flags) if getattr(flags, f.name) is not None}


@dataclass(frozen=True, kw_only=True)
class Training:
    """How to train: what is left out is as the recipe says."""

    epochs: int | None = None
    """Times that every training image is seen; small-image 30, finetune 20, vim and vmamba 300."""
    batch_size: int | None = None
    """Images in a batch; small-image and finetune 64, vim and vmamba 128."""
    accumulation: int | None = None
    """Batches whose gradients are added up for one step, of all processes; 1. Their number has to divide it."""
    lr: float | None = None
    """Peak learning rate; small-image 2e-3, finetune 2e-4, vim and vmamba 1.25e-4 (for a batch of 128)."""
    warmup: float | None = None
    """Share of training spent warming up."""
    weight_decay: float | None = None
    """Of matrices; never of the scan's A and D, of step sizes, positions, norms and biases."""
    clip: float | None = None
    """Largest gradient norm."""
    ema: float | None = None
    """Decay of the moving average of the weights, which is what is evaluated and saved; 0 for none."""
    patience: int | None = None
    """Stop after this many epochs without a better validation accuracy; 0 to train all epochs."""
    save_every: int | None = None
    """Steps between the checkpoints for --resume (each epoch's end has one anyway); 200."""
    gradient_checkpointing: bool = False
    """Recompute each block's activations in the backward: less memory, a third more time."""
    cuda_graph: bool = False
    """Launch forward and backward of each batch as a CUDA graph, for the same numbers. Of use where the GPU waits for
    the processor: small models train 2 to 4 times as fast. Of several GPUs, where each has the whole model."""
    workers: int | None = None
    """Processes that prepare batches; 0 prepares them in the main one."""
    fsdp: bool = False
    """Divide weights and optimizer among the processes that `accelerate launch` or torchrun started (FSDP2)."""
    stall: int | None = None
    """With several processes: seconds without progress after which the run ends and names the stuck one; 1800."""


@dataclass(frozen=True, kw_only=True)
class Augment:
    """What is done to training images: what is left out is as the recipe says."""

    scale: float | None = None
    """Smallest share of an image's area that a random crop keeps; small-image 0.6, finetune 0.35, others 0.08."""
    flip: float | None = None
    """Share of images that are mirrored left to right; 0.5. 0 for what has a right and a left, such as digits."""
    jitter: float | None = None
    """Of brightness, contrast and saturation; 0.3."""
    auto_augment: str | None = None
    """timm's name of a policy such as rand-m9-mstd0.5-inc1, in place of jitter; small-image none."""
    erase: float | None = None
    """Share of images of which a rectangle is erased; small-image and finetune 0.1, others 0.25."""
    mixup: float | None = None
    """Alpha of mixup, 0 for none; vim and vmamba 0.8."""
    cutmix: float | None = None
    """Alpha of cutmix, 0 for none; vim and vmamba 1."""
    smoothing: float | None = None
    """Of the labels; 0.1."""


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a classifier on labelled images: folders of classes, a table, .npz, Parquet, a saved dataset, or IDX."""

    data: Positional[Path]
    """DIR/CLASS/image or DIR/train/CLASS/image; .csv or .tsv of images and labels; .npz; .parquet, or a folder of them
    such as a dataset of Hugging Face's hub; a folder that `datasets.save_to_disk` wrote; a folder of IDX."""
    output: Output
    """Run folder to make: model, metrics, log, curves, pictures and checkpoints."""
    recipe: RecipeName = "small-image"
    """small-image: from scratch on up to 64 pixels; vim and vmamba: the papers' for ImageNet; finetune: from --init."""
    model: ModelName = "vmamba_micro_patch2_32"
    """Size and kind. Millions of parameters with a head of 10: vim_micro 0.44, vmamba_micro 0.38, vmamba_tiny_patch2
    2.6, vim_tiny_patch4 3.4, vim_tiny 7, vmamba_tiny 30."""
    size: int | None = None
    """Pixels of the square that the model sees; left out, what the model was made for."""
    drop_path: float | None = None
    """Stochastic depth of the last block; left out, what the model was made with."""
    init: Path | None = None
    """Run or model folder to begin from, in place of --model; its head is replaced if its classes are other ones."""
    dividing: OmitArgPrefixes[Dividing] = Dividing()
    skip_unreadable: bool = False
    """Leave out images that cannot be read, and say how many; without it the first one is an error."""
    resume: bool = False
    """Continue the run in the output folder where it stopped."""
    train: OmitArgPrefixes[Training] = Training()
    augment: OmitArgPrefixes[Augment] = Augment()
    compute: OmitArgPrefixes[ComputeConfig] = ComputeConfig()

    def __post_init__(self) -> None:
        _require_at_least(self, 4, "size")
        if self.recipe == "finetune" and self.init is None:
            raise ValueError("recipe is finetune; say with --init which model to begin from")
        if self.drop_path is not None and not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path is {self.drop_path}; it must be at least 0 and below 1")
        self.training()  # to hear now what is wrong with them
        self.augmentation()

    def training(self) -> TrainConfig:
        """The recipe's, with what the flags change."""
        return replace(RECIPES[self.recipe].train, **_given(self.train))

    def augmentation(self) -> Augmentation:
        return replace(RECIPES[self.recipe].augment, **_given(self.augment))


@dataclass(frozen=True, kw_only=True)
class _OnModel:
    run: Positional[Path]
    """Run folder of the model, or any model folder."""
    batch_size: int = 64
    """Images in a batch: the result is the same at any number, memory and speed are not."""
    workers: int = 0
    """Processes that read images; 0 reads them in the main one."""
    compute: OmitArgPrefixes[ComputeConfig] = ComputeConfig()

    def __post_init__(self) -> None:
        _require_at_least(self, 1, "batch_size")
        _require_at_least(self, 0, "workers")


@dataclass(frozen=True, kw_only=True)
class Predict(_OnModel):
    """Say what images show: a table of the likeliest classes. What cannot be read is reported in it, too."""

    images: Positional[tuple[Path, ...]]
    """Files, folders with images at any depth, globs, .parquet, or folders that `datasets.save_to_disk` wrote."""
    output: OptionalOutput = None
    """File to write: .csv, .tsv or .json; a table on stdout if left out."""
    top_k: int = 5
    """How many of the likeliest classes to name."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_at_least(self, 1, "top_k")
        if not self.images:
            raise ValueError("no images; name at least one file or folder")


@dataclass(frozen=True, kw_only=True)
class Eval(_OnModel):
    """Measure a model on labelled images: accuracies, each class, confusion, calibration, the worst mistakes."""

    data: Positional[Path]
    """As for train. Its classes must be among the model's."""
    output: Output
    """Folder to make."""
    part: str = "test"
    """The part to measure on, of data that has parts; all of other data."""


@dataclass(frozen=True, kw_only=True)
class Features(_OnModel):
    """Write what a model makes of images before its head; with --probe say how well that tells classes apart."""

    images: Positional[tuple[Path, ...]]
    """As for predict; with --probe one source of labelled images, as for train."""
    output: Output
    """File to write: .npy, with the images' names beside it in .names.tsv, or .parquet."""
    probe: bool = False
    """Fit nearest neighbours and a logistic regression on the images of train and valid, and measure them on test."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.images:
            raise ValueError("no images; name at least one file or folder")


@dataclass(frozen=True, kw_only=True)
class Explain:
    """Draw where a model looks: Grad-CAM of images, the effective receptive field, the order of its scans."""

    run: Positional[Path]
    """Run folder of the model, or any model folder."""
    images: Positional[tuple[Path, ...]]
    """Files, folders with images at any depth, globs, .parquet, or folders that `datasets.save_to_disk` wrote."""
    output: Output
    """Folder to make."""
    class_name: str | None = None
    """The class to explain; left out, each image's likeliest one."""
    most: int = 24
    """No more images than this."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: a CUDA GPU if there is one. Precision is always float32."""
    debug: bool = False
    """Show a traceback when something fails."""

    def __post_init__(self) -> None:
        _require_at_least(self, 1, "most")
        if not self.images:
            raise ValueError("no images; name at least one file or folder")


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write a model for other programs: ONNX of ordinary operations, or torch.export's .pt2; and check it."""

    run: Positional[Path]
    """Run folder of the model, or any model folder."""
    output: Output
    """File to write: .onnx or .pt2; classes and how to prepare an image go to a .json beside it."""
    size: int | None = None
    """Pixels of the square that it will take; left out, what the model was trained on."""
    debug: bool = False
    """Show a traceback when something fails."""

    def __post_init__(self) -> None:
        _require_at_least(self, 4, "size")


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Measure models' speed here: images a second, trained on and judged; memory; how near that is to its limit."""

    models: Positional[tuple[Path, ...]]
    """Run folders, and names of models, ours or any other of timm's, which get random weights; ratios are to the
    first's."""
    size: int | None = None
    """Pixels of the square that the models see; left out, what each was made for."""
    batch_size: int = 64
    """Images in a batch."""
    compile: bool = False
    """Measure under torch.compile, too: compiling takes minutes."""
    repeats: int = 5
    """Times each thing is done; the median is shown."""
    output: OptionalOutput = None
    """File to write the table to (.json or .md); it is printed anyway."""
    compute: OmitArgPrefixes[ComputeConfig] = ComputeConfig()

    def __post_init__(self) -> None:
        _require_at_least(self, 4, "size")
        _require_at_least(self, 1, "batch_size", "repeats")
        if not self.models:
            raise ValueError("no model; name a run folder, or a model such as vim_tiny_patch16_224")
        if self.output is not None and self.output.suffix not in (".json", ".md"):
            raise ValueError(f"output is {self.output}; its ending must be .json or .md")


COMMANDS = {
    "train": (Train, "polymamba.vision.verbs.train:train"),
    "predict": (Predict, "polymamba.vision.verbs.predict:predict"),
    "eval": (Eval, "polymamba.vision.verbs.evaluate:evaluate"),
    "features": (Features, "polymamba.vision.verbs.features:features"),
    "explain": (Explain, "polymamba.vision.verbs.explain:explain"),
    "bench": (Bench, "polymamba.vision.verbs.bench:bench"),
    "export": (Export, "polymamba.vision.verbs.export:export"),
}
