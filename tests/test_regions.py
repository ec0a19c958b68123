"""Queries of which more is said than where they are: a region, prompts, a set taken for one."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import TOY_MODEL, TOY_TRAINING, toy_images
from whence.arguments import Queries
from whence.config import DataSettings
from whence.data import ImageData, concatenate
from whence.diffusion.objectives import sample_loss, sample_output
from whence.errors import DataError
from whence.opening import open_run
from whence.regions import with_masks
from whence.training import train

SMALL = {"timesteps": 2, "draws": 2, "show_progress": False}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("regions") / "run"
    training = replace(TOY_TRAINING, epochs=2, checkpoints=1)
    train(folder, toy_images(6), replace(TOY_MODEL, attention_levels=0), training, show_progress=False)
    opened = open_run(folder, data="demo", out=folder.parent / "out")
    opened.__dict__["opened_images"] = toy_images(6)
    return opened


def paint(path: Path, box: tuple[slice, slice], size: int = 8) -> Path:
    array = np.zeros((size, size), np.uint8)
    array[box] = 255
    path.parent.mkdir(exist_ok=True, parents=True)
    Image.fromarray(array).save(path)
    return path


# --- the loss in a region


def test_outputs_in_a_region_are_those_of_the_region_alone():
    generator = torch.Generator().manual_seed(0)
    prediction, target = torch.randn(2, 3, 2, 8, 8, generator=generator, dtype=torch.float64)
    region = torch.zeros(3, 8, 8, dtype=torch.float64)
    region[:, 2:5, 1:7] = 1
    cut = prediction[:, :, 2:5, 1:7].flatten(1)
    for loss in ("mse", "l1"):
        want = sample_loss(prediction[:, :, 2:5, 1:7], target[:, :, 2:5, 1:7], loss)
        torch.testing.assert_close(sample_loss(prediction, target, loss, region), want)
    for output in ("loss", "squares", "mean", "l1", "l2", "max"):
        want = sample_output(cut, target[:, :, 2:5, 1:7].flatten(1), output, "mse")
        torch.testing.assert_close(sample_output(prediction, target, output, "mse", region), want)
        whole = sample_output(prediction, target, output, "mse", torch.ones_like(region))
        torch.testing.assert_close(whole, sample_output(prediction, target, output, "mse"))


def test_a_region_counts_as_grey_as_it_is():
    error = torch.tensor([[[[1.0, 3.0]]]])
    found = sample_loss(error, torch.zeros_like(error), "mse", torch.tensor([[[1.0, 0.5]]]))
    assert found.item() == pytest.approx((1 * 1 + 0.5 * 9) / 1.5)


# --- masks beside images


def test_one_mask_for_all_and_one_for_each(tmp_path: Path):
    images = toy_images(2, "query")
    one = with_masks(images, paint(tmp_path / "one.png", (slice(0, 4), slice(0, 8))), DataSettings())
    assert one.masks.shape == (2, 8, 8) and one.masks[1, :4].all() and not one.masks[1, 4:].any()
    for k in range(2):
        paint(tmp_path / "each" / f"query-{k}.png", (slice(k, k + 1), slice(0, 8)))
    each = with_masks(images, tmp_path / "each", DataSettings())
    assert each.masks[0, 0].all() and each.masks[1, 1].all() and each.masks.sum() == 16
    assert len({images.fingerprint, one.fingerprint, each.fingerprint}) == 3
    chosen = each.select([1])
    np.testing.assert_array_equal(chosen.masks, each.masks[1:])
    joined = concatenate([chosen, toy_images(1, "whole", seed=3)])
    assert joined.masks[1].all() and joined.region([0]).sum() == 8


def test_masks_of_latents_are_means_over_their_pixels(tmp_path: Path):
    from whence.encoded import Encoded, Latents

    images = with_masks(toy_images(1), paint(tmp_path / "m.png", (slice(0, 3), slice(0, 8))), DataSettings())
    latents = Encoded("x", Latents(np.zeros((1, 4, 4, 4), np.float32)), None, None)
    region = replace(images, encoding=latents).region([0])
    np.testing.assert_allclose(region[0, :, 0], [1, 0.5, 0, 0], atol=1e-6)
    odd = replace(images, encoding=Encoded("x", Latents(np.zeros((1, 4, 3, 3), np.float32)), None, None))
    with pytest.raises(DataError, match="8 x 8 pixels cannot be brought to latents of 3 x 3"):
        odd.region([0])


def test_masks_that_do_not_fit_are_refused(tmp_path: Path):
    images = toy_images(2, "query")
    paint(tmp_path / "each" / "query-0.png", (slice(0, 8), slice(0, 8)))
    paint(tmp_path / "each" / "other.png", (slice(0, 8), slice(0, 8)))
    with pytest.raises(DataError, match="1 queries have none: query-1; 1 masks have no query: other.png"):
        with_masks(images, tmp_path / "each", DataSettings())
    with pytest.raises(DataError, match="black all over: black.png. Paint it white"):
        with_masks(images, paint(tmp_path / "black.png", (slice(0, 0), slice(0, 0))), DataSettings())


# --- traces


def test_what_lies_outside_a_region_does_not_count_in_the_loss(run, tmp_path: Path):
    """The losses of two halves average to that of the whole image, and so do their scores."""
    query = toy_images(1, "query", seed=1)
    top = paint(tmp_path / "top.png", (slice(0, 4), slice(0, 8)))
    bottom = paint(tmp_path / "bottom.png", (slice(4, 8), slice(0, 8)))
    by_mask = [
        run.trace(Queries([query], mask=mask), ["tracin"], dtype="float64", **SMALL)["tracin"].values
        for mask in (top, bottom, None)
    ]
    np.testing.assert_allclose((by_mask[0] + by_mask[1]) / 2, by_mask[2], rtol=1e-6)
    assert np.abs(by_mask[0] - by_mask[1]).max() > 0.01 * np.abs(by_mask[2]).max()


def test_baselines_say_that_a_mask_has_no_part_in_them(run, tmp_path: Path):
    mask = paint(tmp_path / "top.png", (slice(0, 4), slice(0, 8)))
    scores = run.trace(Queries([toy_images(1, "query", seed=1)], mask=mask), ["pixels"], **SMALL)["pixels"]
    assert "Baselines compare whole images; the mask has no part in them." in scores.notes


def test_a_set_of_queries_is_their_mean(run):
    scores = run.trace(toy_images(3, "query", seed=1), ["retrac"], **SMALL)["retrac"]
    pooled = run.pool(scores, "a style")
    assert pooled.query_ids == ("a style",) and pooled.details["pooled"] == list(scores.query_ids)
    np.testing.assert_allclose(pooled.values[0], scores.values.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(pooled.phases.sum(axis=1), pooled.values, rtol=1e-5)
    assert pooled.reliability().shape == (1,)
    assert run.pool(scores, "a style").folder == pooled.folder


def test_prompts_are_one_for_each_or_one_for_all(run):
    images = toy_images(3, "query", seed=1)
    assert run.open_queries(Queries([images], prompts=["a", "b", "c"])).captions == ("a", "b", "c")
    assert run.open_queries(Queries([images], prompts=["a"])).captions == ("a", "a", "a")
    with pytest.raises(DataError, match="one prompt for each query image, or one for all; found 2 prompts for 3"):
        run.open_queries(Queries([images], prompts=["a", "b"]))


def test_a_report_shows_what_was_said_of_the_queries(run, tmp_path: Path):
    query = ImageData.from_arrays(toy_images(1, seed=1).pixels([0]), ["query"])
    Image.fromarray(((query.pixels([0])[0].transpose(1, 2, 0) + 1) * 127.5).astype(np.uint8)).save(tmp_path / "q.png")
    mask = paint(tmp_path / "top.png", (slice(0, 4), slice(0, 8)))
    run.trace(Queries([tmp_path / "q.png"], mask=mask, prompts=["a cat"]), ["tracin"], **SMALL)
    _, opened, _ = run.load_scores()
    assert opened.captions == ("a cat",) and opened.masks is not None
    assert run.report().exists()


def test_queries_taken_together_are_what_the_report_shows(run, tmp_path: Path):
    for k in range(2):
        pixels = toy_images(2, seed=1).pixels([k])[0]
        Image.fromarray(((pixels.transpose(1, 2, 0) + 1) * 127.5).astype(np.uint8)).save(tmp_path / f"{k}.png")
    scores = run.trace(Queries([tmp_path]), ["tracin", "retrac"], **SMALL)
    for one in scores.values():
        run.pool(one, "six fingers")
    shown, opened, _ = run.load_scores()
    assert {one.query_ids for one in shown} == {("six fingers",)} and opened.ids == ("six fingers",)
    assert "six fingers" in run.report().read_text() and "2 queries taken together" in run.report().read_text()


def test_one_prompt_may_be_a_string_and_one_mask_in_a_folder_is_no_mask_for_all(run, tmp_path: Path):
    images = toy_images(2, "query", seed=1)
    assert run.open_queries(Queries(images, prompts="one for all")).captions == ("one for all",) * 2
    paint(tmp_path / "masks" / "query-0.png", (slice(0, 4), slice(0, 8)))
    with pytest.raises(DataError, match="1 queries have none: query-1. Give the file of one mask"):
        run.open_queries(Queries(images, mask=tmp_path / "masks"))
