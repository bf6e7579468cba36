"""Trained weights on disk come back as they were, or not at all."""

import numpy as np
import pytest

from gdiff_jax.victims import checkpoints, zoo


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a LeNet for 8 px and 7 classes after 5 steps, and its weights."""
    folder = tmp_path_factory.mktemp("victims")
    params = zoo.init_params("lenet", zoo.make_victim("lenet", (8, 8, 3), 7), 0)
    manager = checkpoints.manager(folder, "lenet")
    checkpoints.save(manager, 5, params, {"shapes": {k: list(v.shape) for k, v in params.items()}, "accuracy": 0.5})
    manager.wait_until_finished()
    return str(folder), params


def test_weights_come_back_with_what_was_noted(saved):
    folder, params = saved
    restored, about = checkpoints.load(folder, "lenet", 5, zoo.make_victim("lenet", (8, 8, 3), 7))
    assert about["accuracy"] == 0.5
    assert restored.keys() == params.keys()
    for name, value in params.items():
        np.testing.assert_array_equal(restored[name], value)


def test_weights_that_are_not_there_or_of_another_network_are_refused_with_the_remedy(saved):
    folder, _ = saved
    remedy = f"gdiff-train-victim --victim=lenet --steps=.* --out={folder}"
    victim = zoo.make_victim("lenet", (8, 8, 3), 10)
    with pytest.raises(ValueError, match=rf"lenet/5 is of another shape: fc.*7.*10 classes has .*; {remedy}"):
        checkpoints.load(folder, "lenet", 5, victim)
    with pytest.raises(ValueError, match=f"no weights of lenet after 6 steps in '{folder}'; make them with: {remedy}"):
        checkpoints.load(folder, "lenet", 6, victim)
    with pytest.raises(ValueError, match=r"no weights of lenet after 6 steps in ''; .*--out=FOLDER"):
        checkpoints.load("", "lenet", 6, victim)


def test_a_checkpoint_that_is_broken_is_refused_with_the_remedy(saved, tmp_path):
    (tmp_path / "lenet" / "5").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"lenet/5 cannot be read .*make it again: gdiff-train-victim"):
        checkpoints.load(str(tmp_path), "lenet", 5, zoo.make_victim("lenet", (8, 8, 3), 7))


def test_a_victim_that_is_not_known_or_cannot_be_made_is_refused():
    with pytest.raises(ValueError, match="victim 'vgg' is not known; known: mlp, lenet"):
        zoo.make_victim("vgg", (8, 8, 3), 10)
    with pytest.raises(ValueError, match="victim 'vit': "):
        zoo.make_victim("vit", (9, 9, 3), 10)
