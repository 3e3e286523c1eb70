"""`polymamba vision features`: what a model makes of images before its head, and how much that tells."""

import numpy as np
import torch

from ...core.device import autocast, pick_device
from ...core.embeddings import require_embeddings_file, write_embeddings
from ...core.errors import InputError
from ...core.terminal import progress_bar
from ..commands import Features
from ..dataset import ImageSet
from ..inference import batches, for_batches
from ..model import load_image_model
from ..sources import find_images, read_source
from ..transforms import data_config

NEIGHBOURS = 10


def features(args: Features) -> None:
    """Write the embedding of every image; with --probe also say how well they tell the classes apart."""
    require_embeddings_file(args.output)
    labelled = read_source(args.images[0]) if args.probe else None
    if labelled is not None and len(args.images) > 1:
        raise InputError("--probe: give one source of labelled images, as for train")
    items, names = find_images(args.images) if labelled is None else (labelled.items, labelled.names)
    model = load_image_model(args.run).to(pick_device(args.compute))
    embed = for_batches(model, lambda x: model.forward_head(model.forward_features(x), pre_logits=True))
    found = []
    with progress_bar("features", len(names), "images") as advance, torch.no_grad(), autocast(args.compute):
        for x, _ in batches(items, names, data_config(model), args.batch_size, workers=args.workers):
            found.append(embed(x).float().cpu().numpy())
            advance(len(x))
    embeddings = np.concatenate(found)
    write_embeddings(args.output, {"image": str}, embeddings.shape, [([(name,) for name in names], embeddings)])
    if labelled is not None:
        for name, accuracy in probe(embeddings, labelled, args.compute.seed).items():
            print(f"{name:<16}{accuracy:.4f}")


def probe(embeddings: np.ndarray, images: ImageSet, seed: int) -> dict[str, float]:
    """Accuracy on the test images of classifiers of embeddings (n, D), fitted on all others.

    knn           majority of the NEIGHBOURS nearest by cosine
    linear probe  logistic regression on standardised features
    Raises InputError if the images have no parts test and train.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    test, rest = images.parts == "test", np.isin(images.parts, ("train", "valid"))
    if not test.any() or not rest.any():
        raise InputError("--probe needs images divided into train and test, by folders or a column `part`")
    k = min(NEIGHBOURS, int(rest.sum()))
    readers = {
        f"{k}-NN": KNeighborsClassifier(k, metric="cosine"),
        "linear probe": make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000, random_state=seed)),
    }
    return {
        name: float(reader.fit(embeddings[rest], images.labels[rest]).score(embeddings[test], images.labels[test]))
        for name, reader in readers.items()
    }
