"""The images that are trained on, and those that never are."""

from __future__ import annotations

import numpy as np

from gdiff_jax.images import ImageSet, load_images


def load_split(source: str, size: int, limit: int | None = None, channels: int | None = None) -> tuple[ImageSet, ImageSet]:
    """(training, held-out) images of a source; `size` and `channels` as in `load_images`.

    Of CIFAR-10 the training split, and test images 1000 to 8999 (the bundled private set lies below, the last thousand
    is kept for others). Pictures in sub-folders `train` and `validation` as they lie. Any other set gives a tenth of its
    images, drawn by a fixed seed. At most `limit` held-out images are given; what is trained on does not depend on it.
    """
    train = load_images(source, "train", size, channels)
    if train.names[0] == "cifar10-train/0":
        heldout = load_images(source, "test", channels=channels).take(slice(1000, 9000))
    elif train.has_splits:
        heldout = load_images(source, "test", size, channels, limit)
    else:
        order = np.random.default_rng(0).permutation(len(train))  # folders are sorted by class
        train, heldout = train.take(order[len(train) // 10 :]), train.take(order[: len(train) // 10])
    if not len(heldout):
        raise ValueError(f"{source} has {len(train)} images, too few to hold a tenth of them out")
    return train, heldout.take(slice(0, limit))
