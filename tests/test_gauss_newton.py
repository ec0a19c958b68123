"""Products with the Gauss-Newton matrix against the matrix itself, from whole Jacobians in float64."""

from dataclasses import replace

import pytest
import torch

import reference
from whence.checkpoints import load_model, load_scheduler
from whence.config import TraceSettings
from whence.event_table import grid_events
from whence.gauss_newton import GaussNewton
from whence.methods import Grid

PATTERNS = ("conv_in.*", "mid_block.attentions.0.*", "conv_norm_out.*", "conv_out.*", "time_embedding.linear_1.bias")
"""Convolutions, attention, normalisations and a layer on the time embedding."""

SETTINGS = TraceSettings(batch_size=3, dtype="float64", parameters=PATTERNS)
ROWS, GRID = [2, 9], Grid(timesteps=2, draws=2)


@pytest.fixture(scope="module")
def dense(subject, toy_train):
    """The mean, and each event's own."""
    source = subject.source(subject.checkpoints[-1], SETTINGS)
    model = load_model(subject.checkpoints[-1], dtype="float64")
    parameters = [model.get_parameter(name) for name in source.layout.spans]
    scheduler = load_scheduler(subject.checkpoints[-1])
    return reference.gauss_newton(model, scheduler, toy_train, ROWS, GRID.timesteps, parameters, GRID.draws)


def make_matrix(subject, images, settings=SETTINGS):
    source = subject.source(subject.checkpoints[-1], settings)
    table = grid_events(images, ROWS, "train", GRID, source.process.num_timesteps, seed=0)
    return GaussNewton(source, images, table)


def random_vectors(matrix, count=3):
    shape = (count, matrix.source.layout.num_params)
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_products_are_those_of_the_dense_matrix(subject, toy_train, dense):
    matrix, passes = make_matrix(subject, toy_train), []
    vectors = random_vectors(matrix)
    found = matrix.multiply(vectors, passes.append)
    torch.testing.assert_close(found, vectors @ dense[0], rtol=1e-9, atol=1e-12 * float(dense[0].abs().max()))
    assert sum(passes) == 2 * 8 * 3  # two for each event and vector


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_products_do_not_depend_on_the_batch_size(subject, toy_train, dense, batch_size):
    matrix = make_matrix(subject, toy_train, replace(SETTINGS, batch_size=batch_size))
    vectors = random_vectors(matrix)
    found = matrix.multiply(vectors, lambda n: None)
    torch.testing.assert_close(found, vectors @ dense[0], rtol=1e-9, atol=1e-12 * float(dense[0].abs().max()))


def test_some_events_alone(subject, toy_train, dense):
    matrix = make_matrix(subject, toy_train)
    vectors, which = random_vectors(matrix), [0, 3, 4, 7]
    found = matrix.multiply(vectors, lambda n: None, matrix.table.take(torch.tensor(which).numpy()))
    want = vectors @ torch.stack([dense[1][k] for k in which]).mean(0)
    torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-12 * float(want.abs().max()))


def test_the_model_is_left_as_it_was(subject, toy_train):
    matrix = make_matrix(subject, toy_train)
    matrix.multiply(random_vectors(matrix), lambda n: None)
    assert all(p.requires_grad and p.grad is None for p in matrix.source.model.parameters())


def test_the_mean_eigenvalue_is_that_of_the_trace(subject, toy_train, dense):
    """Each event's sampled square has the mean tr(G_e) and the variance 2 tr(G_e^2)."""
    matrix, passes = make_matrix(subject, toy_train), []
    found = matrix.mean_eigenvalue(passes.append) * len(dense[0])
    deviation = sum(2 * float((part @ part).trace()) for part in dense[1]) ** 0.5 / len(dense[1])
    assert deviation < 0.5 * float(dense[0].trace())  # or the next line says little
    assert abs(found - float(dense[0].trace())) < 3 * deviation
    assert sum(passes) == 8
    again = make_matrix(subject, toy_train, replace(SETTINGS, batch_size=64)).mean_eigenvalue(lambda n: None)
    assert again * len(dense[0]) == pytest.approx(found, rel=1e-12)
