"""`polymamba vision export`: a model for other programs, and how far their results are from ours."""

import json

from ...core.config import ComputeConfig
from ...core.errors import InputError
from ...core.files import require_writable, write_json
from ...core.terminal import say
from ..commands import Export
from ..export import export_onnx, export_program
from ..transforms import data_config
from .common import load_model

TOLERANCE = 1e-3  # of the largest logit


def export(args: Export) -> None:
    """Write the file and what its user has to know beside it: classes, and how to prepare an image."""
    suffix = args.output.suffix.lower()
    if suffix not in (".onnx", ".pt2"):
        raise InputError(f"{args.output}: name it .onnx or .pt2, which says what is written")
    require_writable(args.output)
    model, classes = load_model(args.run, ComputeConfig(device="cpu"))
    view = data_config(model)
    size = view["input_size"] if args.size is None else (view["input_size"][0], args.size, args.size)
    say(f"exporting {type(model).__name__} for images of {'x'.join(map(str, size))}; minutes for a deep model")
    parity = (export_onnx if suffix == ".onnx" else export_program)(model, size, args.output)
    prepare = {name: value for name, value in view.items() if name != "input_size"}
    about = {"input_size": size, "classes": classes, **prepare, "parity": vars(parity)}
    write_json(args.output.with_suffix(".json"), json.loads(json.dumps(about)))
    print(parity)
    if not parity.largest_difference < TOLERANCE:
        raise InputError(f"{args.output}: differs from the model by {parity.largest_difference:.1e}: do not use it")
