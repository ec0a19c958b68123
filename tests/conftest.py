"""A run small enough to be made in seconds, images to make it of, and both ways to its scores."""

from dataclasses import replace

import numpy as np
import pytest

from whence.attribution import trace
from whence.checkpoints import list_checkpoints
from whence.config import IndexSettings, ModelSettings, QuerySettings, TraceSettings, TrainingSettings
from whence.data import ImageData
from whence.indexing import index
from whence.querying import query
from whence.record import Record
from whence.subject import Subject
from whence.training import train

collect_ignore_glob = ["scripts/*"]
"""Run by tests in processes of their own, beside each other."""

TOY_MODEL = ModelSettings(widths=(8, 8), layers_per_block=1, attention_levels=1, norm_groups=4, train_timesteps=50)
TOY_TRAINING = TrainingSettings(
    epochs=4, batch_size=4, checkpoints=2, warmup_steps=2, loss="mse", random_flip=True, max_grad_norm=0.5
)
QUERY = QuerySettings(timesteps=5, draws=4, phases=2, batch_size=8)
EXACT = IndexSettings(projection="identity", rows="float32", batch_size=8, block_size=4)
"""A store whose scores differ by rounding alone from those of streaming."""


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


@pytest.fixture(scope="module")
def subject(toy_run, toy_train) -> Subject:
    """The trained run, as it is traced."""
    return Subject(list_checkpoints(toy_run), toy_train, Record.open(toy_run / "record"), "mse")


@pytest.fixture(scope="module")
def store(subject, tmp_path_factory):
    """Exact rows of every visit; read only."""
    return index(subject, EXACT, tmp_path_factory.mktemp("run"), show_progress=False)


def stream(subject, queries, methods, folder, **changes):
    """Score queries without a store."""
    settings = replace(TraceSettings(**vars(QUERY), block_size=4), **changes)
    return trace(subject, queries, methods, settings, folder, show_progress=False)


def ask(subject, store, queries, methods, folder, **options):
    """Score queries from a store."""
    return query(subject, store, queries, methods, QUERY, folder, show_progress=False, **options)
