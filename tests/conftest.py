"""A run small enough to be made in seconds, and images to make it of."""

import numpy as np
import pytest

from whence.config import ModelSettings, TrainingSettings
from whence.data import ImageData
from whence.training import train

collect_ignore_glob = ["scripts/*"]
"""Run by tests in processes of their own, beside each other."""

TOY_MODEL = ModelSettings(widths=(8, 8), layers_per_block=1, attention_levels=1, norm_groups=4, train_timesteps=50)
TOY_TRAINING = TrainingSettings(
    epochs=4, batch_size=4, checkpoints=2, warmup_steps=2, loss="mse", random_flip=True, max_grad_norm=0.5
)


def toy_images(count: int, prefix: str = "train", seed: int = 0) -> ImageData:
    """Random 8 x 8 images, smooth enough to be learnt a little."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(-1, 1, (count, 3, 4, 4)).astype(np.float32)
    labels = ["odd" if k % 5 == 4 else "even" for k in range(count)]
    return ImageData.from_arrays(coarse.repeat(2, 2).repeat(2, 3), [f"{prefix}-{k}" for k in range(count)], labels)


@pytest.fixture(scope="session")
def toy_train() -> ImageData:
    """Ten training images, which four does not divide."""
    return toy_images(10)


@pytest.fixture(scope="session")
def toy_queries() -> ImageData:
    """Three queries that were not trained on."""
    return toy_images(3, "query", seed=1)


@pytest.fixture(scope="session")
def toy_run(tmp_path_factory, toy_train):
    """A trained run with two checkpoints; read only."""
    folder = tmp_path_factory.mktemp("toy") / "run"
    train(folder, toy_train, TOY_MODEL, TOY_TRAINING, show_progress=False)
    return folder
