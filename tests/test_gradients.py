"""Gradient sums and products of one checkpoint against the batch-of-one reference, in float64."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from conftest import TOY_MODEL, toy_images
from reference import gradient, query_gradients
from whence.config import LossName, ModelSettings
from whence.data import ImageData
from whence.diffusion.noise import Side, normals
from whence.diffusion.process import NoiseProcess
from whence.errors import ConfigError, NumericsError, UnsupportedModelError
from whence.event_table import grid_events
from whence.gradients import GradientSource
from whence.grid_sums import Family, num_vectors
from whence.methods import Grid
from whence.training import make_model, make_scheduler

RTOL = 1e-9  # float64 sums in another order
PHASES = 2
GRID = Grid(timesteps=5, draws=4)


def make_source(
    images: ImageData,
    *,
    batch_size: int = 8,
    loss: LossName = "mse",
    settings: ModelSettings = TOY_MODEL,
    dtype: torch.dtype = torch.float64,
):
    model = make_model(settings, images, seed=0).to(dtype).eval()
    process = NoiseProcess.from_scheduler(make_scheduler(settings))
    return GradientSource(model, process, loss, batch_size, "checkpoint 7")


@pytest.fixture(scope="module")
def images():
    return toy_images(3, "query")


@pytest.fixture(scope="module")
def source(images: ImageData):
    return make_source(images)


@pytest.fixture(scope="module")
def draws_of(images: ImageData, source: GradientSource):
    """Reference gradients of every image: timestep, draw, parameter."""

    def gradients(row: int):
        pixels, table = images.pixels([row])[0], grid_events(images, [row], "query", GRID, 50, 0)
        events = [
            gradient(source.model, make_scheduler(TOY_MODEL), pixels, int(t), normals(int(key), pixels.shape))
            for t, key in zip(table.timestep, table.noise_key, strict=True)
        ]
        return torch.stack(events).unflatten(0, (GRID.timesteps, GRID.draws))

    return [gradients(row) for row in range(len(images))]


def no_update(num_events: int):
    pass


def grid_vectors(
    source: GradientSource,
    images: ImageData,
    rows: Sequence[int] = (0, 1, 2),
    families: Sequence[Family] = ("none", "timestep"),
    grid: Grid = GRID,
    phases: int = PHASES,
    halves: bool = True,
):
    options = {"phases": phases, "halves": halves, "seed": 0, "update": no_update}
    return source.grid_vectors(images, list(rows), "query", grid, list(families), **options)


def assert_close(found: Any, want: Any):
    found, want = torch.as_tensor(found), torch.as_tensor(want)
    torch.testing.assert_close(found, want, rtol=RTOL, atol=RTOL * float(want.abs().max()))


def unit(vectors: Tensor):
    return vectors / vectors.norm(dim=-1, keepdim=True)


# --- sums over a grid


def test_rows_are_what_the_table_of_the_module_says(source: GradientSource, images: ImageData, draws_of: list[Tensor]):
    # Batches hold two points of five, so some hold points of two samples and every sample is split.
    found = grid_vectors(source, images)
    for sample, draws in zip(found, draws_of, strict=True):
        both, half_a, half_b = draws.mean(1), draws[:, :2].mean(1), draws[:, 2:].mean(1)
        phase = torch.tensor([0, 0, 0, 1, 1])
        want = [
            both[phase == 0].sum(0) / 5,
            both[phase == 1].sum(0) / 5,
            half_a.mean(0),
            unit(both)[phase == 0].sum(0) / 5,
            unit(both)[phase == 1].sum(0) / 5,
            unit(half_a).mean(0),
            unit(half_b).mean(0),
        ]
        assert_close(sample.vectors, torch.stack(want))
        assert_close(sample.norms, both.norm(dim=1))
    assert len(found[0].vectors) == num_vectors("none", PHASES, True) + num_vectors("timestep", PHASES, True)


def test_reference_of_the_scores(source: GradientSource, images: ImageData):
    """The same mean that the reference of whole scores uses."""
    scheduler = make_scheduler(TOY_MODEL)
    per_timestep = query_gradients(source.model, scheduler, images.pixels([1])[0], images.ids[1], 5, 4)
    (found,) = grid_vectors(source, images, rows=[1], phases=1, halves=False)
    assert_close(found.vectors, torch.stack([per_timestep.mean(0), unit(per_timestep).mean(0)]))


@pytest.mark.parametrize("families", [("none",), ("timestep",), ("timestep", "none")])
@pytest.mark.parametrize("halves", [False, True])
def test_families_alone_and_in_another_order(
    source: GradientSource, images: ImageData, families: Sequence[Family], halves: bool
):
    both = grid_vectors(source, images, rows=[2], halves=halves)[0].vectors
    split = dict(
        zip(
            ("none", "timestep"),
            both.split([num_vectors("none", 2, halves), num_vectors("timestep", 2, halves)]),
            strict=True,
        )
    )
    found = grid_vectors(source, images, rows=[2], families=families, halves=halves)[0].vectors
    assert_close(found, torch.cat([split[family] for family in families]))


@pytest.mark.parametrize("batch_size", [4, 7, 12, 100])
def test_sums_do_not_depend_on_batches_or_on_other_samples(images: ImageData, source: GradientSource, batch_size: int):
    want = grid_vectors(source, images)
    other = make_source(images, batch_size=batch_size)
    for found, row in zip(grid_vectors(other, images, rows=[2, 0]), [2, 0], strict=True):
        assert_close(found.vectors, want[row].vectors)
        assert_close(found.norms, want[row].norms)


def test_one_draw(source: GradientSource, images: ImageData):
    grid = Grid(timesteps=3, draws=1)
    (found,) = grid_vectors(source, images, rows=[0], grid=grid, halves=False, phases=3)
    per_timestep = query_gradients(source.model, make_scheduler(TOY_MODEL), images.pixels([0])[0], images.ids[0], 3, 1)
    assert_close(found.vectors, torch.cat([per_timestep, unit(per_timestep)]) / 3)
    assert_close(found.norms, per_timestep.norm(dim=1))


def test_every_event_is_counted(source: GradientSource, images: ImageData):
    seen = []
    source.grid_vectors(
        images, [0, 1], "train", GRID, ["none"], phases=1, halves=False, seed=0, update=lambda count: seen.append(count)
    )
    assert seen == [8] * 5


def test_sides_and_seeds_have_noise_of_their_own(source: GradientSource, images: ImageData):
    def first(side: Side, seed: int):
        options = {"phases": 1, "halves": False, "seed": seed, "update": no_update}
        return source.grid_vectors(images, [0], side, Grid(2), ["none"], **options)[0].vectors

    assert not torch.equal(first("train", 0), first("query", 0))
    assert not torch.equal(first("query", 1), first("query", 0))
    assert torch.equal(first("query", 0), first("query", 0))


def silent_source(batch_size: int = 8):
    """A model that answers 0 and is asked for a black image: the loss and its gradient are 0."""
    images = ImageData.from_arrays(np.zeros((2, 3, 8, 8), np.float32), ["black", "night"])
    source = make_source(images, settings=replace(TOY_MODEL, prediction_type="sample"), batch_size=batch_size)
    torch.nn.init.zeros_(source.model.conv_out.weight)
    torch.nn.init.zeros_(source.model.conv_out.bias)
    return source, images


def test_a_gradient_of_zero_gives_a_row_of_zeros():
    source, images = silent_source()
    for found in grid_vectors(source, images, rows=[0, 1]):
        assert (found.vectors == 0).all()
        assert (found.norms == 0).all()
    table = grid_events(images, [0, 1], "train", Grid(2), 50, 0)
    dots, norms = source.dots(table, images, torch.ones(1, source.layout.num_params, dtype=torch.float64), no_update)
    assert (dots == 0).all() and (norms == 0).all()
    source.check(images)


def test_draws_that_do_not_fit_into_a_batch_are_refused(images: ImageData):
    source = make_source(images, batch_size=3)
    with pytest.raises(ConfigError, match="batch_size must be at least 4; found 3"):
        grid_vectors(source, images)


# --- products with fixed vectors


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_products_and_norms_of_events(images: ImageData, draws_of: list[Tensor], batch_size: int):
    source = make_source(images, batch_size=batch_size)
    table = grid_events(images, [2, 0], "query", GRID, 50, 0)
    gradients = torch.cat([draws_of[2].flatten(0, 1), draws_of[0].flatten(0, 1)])
    vectors = torch.randn(3, gradients.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    seen = []
    dots, norms = source.dots(table, images, vectors, seen.append)
    assert_close(dots, gradients @ vectors.T)
    assert_close(norms, gradients.norm(dim=1))
    assert sum(seen) == len(table) and max(seen) <= batch_size


def test_products_in_float32(images: ImageData, draws_of: list[Tensor]):
    source = make_source(images, dtype=torch.float32)
    table = grid_events(images, [1], "query", GRID, 50, 0)
    gradients = draws_of[1].flatten(0, 1)
    vectors = unit(torch.randn(3, gradients.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    dots, norms = source.dots(table, images, vectors.float(), no_update)
    # The promise of DESIGN.md 6.1: 1e-5 of the product of the lengths.
    assert (np.abs(dots - (gradients @ vectors.T).numpy()) <= 1e-5 * norms[:, None]).all()
    np.testing.assert_allclose(norms, gradients.norm(dim=1), rtol=1e-5)


def test_l1_loss_and_loss_weights(images: ImageData):
    source = make_source(images, loss="l1")
    table = grid_events(images, [1], "query", Grid(2), 50, 0)
    table = replace(table, loss_weight=np.array([1, 3], np.float32), weight=np.array([5.0, 7.0]))
    pixels = images.pixels([1])[0]
    want = [
        gradient(source.model, make_scheduler(TOY_MODEL), pixels, int(t), normals(int(key), pixels.shape), "l1")
        for t, key in zip(table.timestep, table.noise_key, strict=True)
    ]
    _, norms = source.dots(table, images, torch.zeros(0, source.layout.num_params, dtype=torch.float64), no_update)
    assert_close(
        norms, torch.stack([want[0].norm(), 3 * want[1].norm()])
    )  # weight, the w_e of scores, is no part of it


def test_without_vectors_there_are_norms_only(source: GradientSource, images: ImageData, draws_of: list[Tensor]):
    table = grid_events(images, [0], "query", GRID, 50, 0)
    dots, norms = source.dots(table, images, torch.zeros(0, source.layout.num_params, dtype=torch.float64), no_update)
    assert dots.shape == (20, 0)
    assert_close(norms, draws_of[0].flatten(0, 1).norm(dim=1))


def test_no_events_no_products(source: GradientSource, images: ImageData):
    table = grid_events(images, [], "query", GRID, 50, 0)
    dots, norms = source.dots(table, images, torch.zeros(2, source.layout.num_params, dtype=torch.float64), no_update)
    assert (dots.shape, norms.shape) == ((0, 2), (0,))
    assert grid_vectors(source, images, rows=[]) == []


# --- refusals


def test_a_gradient_that_is_not_finite_is_named(source: GradientSource, images: ImageData):
    table = grid_events(images, [0, 1, 2], "query", GRID, 50, 0)
    loss_weight = np.ones(len(table), np.float32)
    loss_weight[[33, 39]] = np.nan
    bad = replace(table, loss_weight=loss_weight)
    message = (
        rf"{images.ids[1]} at timestep {table.timestep[33]} is not finite at checkpoint 7 \(2 such in this batch\)"
    )
    with pytest.raises(NumericsError, match=message):
        source.dots(bad, images, torch.zeros(0, source.layout.num_params, dtype=torch.float64), no_update)


def test_weights_that_are_not_finite_are_named(images: ImageData):
    source = make_source(images)
    with torch.no_grad():
        source.model.conv_out.bias[0] = torch.nan
    with pytest.raises(NumericsError, match=r"gradient of query-1 at timestep 1 is not finite at checkpoint 7"):
        grid_vectors(source, images, rows=[1, 0])
    with pytest.raises(NumericsError, match=r"gradient of query-0 at timestep 1 is not finite at checkpoint 7"):
        source.check(images)


def test_the_check_of_the_first_batch(images: ImageData):
    source = make_source(images)
    before = [p.requires_grad for p in source.model.parameters()]
    source.check(images)
    assert [p.requires_grad for p in source.model.parameters()] == before
    assert all(p.grad is None for p in source.model.parameters())
    one = ImageData.from_arrays(images.pixels([0]), ["one"])
    source.check(one)


def test_the_check_refuses_a_network_that_mixes_samples(images: ImageData):
    source = make_source(images)
    source.model.conv_in.register_forward_pre_hook(lambda layer, args: (args[0] - 0.1 * args[0].mean(0),))
    with pytest.raises(UnsupportedModelError, match="depends on the other samples of its batch"):
        source.check(images)
