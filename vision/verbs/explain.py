"""`polymamba vision explain`: pictures of where a model looks."""

from pathlib import Path

import torch

from ...core.config import ComputeConfig
from ...core.errors import InputError
from ...core.files import new_folder, require_new_folder
from ...core.terminal import progress_bar, say
from ..commands import Explain
from ..explain import grad_cam, receptive_field, scan_order
from ..images import read_image
from ..plots import plot_gradcam, plot_receptive_field, plot_scan_order
from ..sources import find_images
from ..transforms import centre_view, data_config, eval_transform
from .common import load_model


def explain(args: Explain) -> None:
    """gradcam.png, receptive_field.png and scan_order.png in a new folder."""
    require_new_folder(args.output)
    items, names = find_images(args.images)
    if len(names) > args.most:
        say(f"the first {args.most} of {len(names)} images; --most for others")
        names = names[: args.most]
    model, classes = load_model(args.run, ComputeConfig(device=args.device))
    if args.class_name is not None and args.class_name not in classes:
        raise InputError(f"--class-name {args.class_name}: none of the model's classes: {', '.join(classes[:20])}")
    wanted = None if args.class_name is None else torch.tensor([classes.index(args.class_name)])
    view, device = data_config(model), next(model.parameters()).device
    transform, rows, field = eval_transform(view), [], torch.zeros(view["input_size"][1:], dtype=torch.float64)
    with progress_bar("explain", len(names), "images") as advance:
        for i, name in enumerate(names):
            image = read_image(items[i], name)
            x = transform(image)[None].to(device)
            cam, chosen = grad_cam(model, x, None if wanted is None else wanted.to(device))
            field += receptive_field(model, x).double().cpu()
            rows.append(
                (centre_view(image, view), cam[0].cpu().numpy(), f"{Path(name).name}: {classes[int(chosen[0])]}")
            )
            advance(1)
    with new_folder(args.output) as beside:
        plot_gradcam(beside / "gradcam.png", rows)
        plot_receptive_field(beside / "receptive_field.png", (field / len(names)).numpy(), len(names))
        plot_scan_order(beside / "scan_order.png", scan_order(model, *view["input_size"][1:]))
    say(f"{args.output}: gradcam.png, receptive_field.png, scan_order.png")
