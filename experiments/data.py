"""The images that an experiment trains on, and those that it never does."""

from __future__ import annotations

import numpy as np

from gdiff_jax.images import ImageSet, load_images


def load_split(source: str, size: int, limit: int | None = None) -> tuple[ImageSet, ImageSet]:
    """(training, held-out) images of a source; `size` as in `load_images`.

    Of CIFAR-10 the training split, and test images 1000 to 8999 (the bundled private set lies below, the last thousand
    is kept for others). Pictures in sub-folders `train` and `validation` as they lie. Any other set gives a tenth of its
    images, drawn by a fixed seed. At most `limit` images are held out.
    """
    train = load_images(source, "train", size)
    if train.names[0].startswith("cifar10-"):
        return train, load_images(source, "test").take(slice(1000, 9000)).take(slice(0, limit))
    if train.names[0].startswith("train/") and not source.endswith(".npz"):
        return train, load_images(source, "test", size).take(slice(0, limit))
    order = np.random.default_rng(0).permutation(len(train))  # folders are sorted by class
    held = len(train) // 10 if limit is None else min(limit, len(train) // 10)
    return train.take(order[held:]), train.take(order[:held])
