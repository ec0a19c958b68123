"""Coarser types in the forward pass: close to the float32 scores, and nothing lost on the way back."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from conftest import TOY_MODEL, toy_images
from whence.attribution import check_trace_settings, trace
from whence.config import TraceSettings
from whence.diffusion.process import NoiseProcess
from whence.errors import ConfigError, NumericsError, UnsupportedModelError
from whence.event_table import grid_events
from whence.gradients import GradientSource
from whence.methods import RETRAC, TRACIN, Grid
from whence.precision import output_scale, tensor_float_32
from whence.training import make_model, make_scheduler

SETTINGS = TraceSettings(timesteps=5, draws=4, phases=2, batch_size=8, block_size=4)


@pytest.fixture(scope="module")
def traced(subject, toy_queries, tmp_path_factory):
    folder = tmp_path_factory.mktemp("precision")

    def scores(**changes):
        settings = replace(SETTINGS, **changes)
        return trace(subject, toy_queries, [TRACIN, RETRAC], settings, folder, show_progress=False)

    return scores


def make_source(autocast, images, model=None, **options):
    model = model or make_model(TOY_MODEL, images, seed=0).eval()
    process = NoiseProcess.from_scheduler(make_scheduler(TOY_MODEL))
    return GradientSource(model, process, "mse", 8, "checkpoint 7", autocast=autocast, **options)


@pytest.mark.parametrize("autocast", ["bf16", "fp16"])
def test_scores_under_autocast_are_those_of_float32_but_for_its_rounding(traced, autocast):
    exact, rounded = traced(), traced(autocast=autocast)
    for name in ("tracin", "retrac"):
        found, want = rounded[name].values, exact[name].values
        assert not np.array_equal(found, want)
        assert found.dtype == np.float32
        for one, other in zip(found, want, strict=True):
            assert np.corrcoef(one, other)[0, 1] > 0.99  # measured: 1 - r is 3e-5 for bf16, 1e-7 for fp16
        assert np.abs(found - want).max() < ERRORS[autocast] * np.abs(want).max()


ERRORS = {"bf16": 0.03, "fp16": 0.003}
"""Of the largest score. Measured on this toy, tracin and retrac: bf16 0.007 and 0.006, fp16 0.0003 for both."""


def test_under_bf16_batches_make_no_more_difference_than_its_rounding(traced):
    eight, five = traced(autocast="bf16"), None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("whence.attribution.SCORING_VERSION", 1000)  # a hash of its own: the batch size is in none
        five = traced(autocast="bf16", batch_size=5, block_size=3)
    for name in ("tracin", "retrac"):
        found, want = five[name].values, eight[name].values
        # bfloat16 has 8 bits. Measured on a CPU: 1e-7, as its kernels do not depend on the batch; others' may.
        assert np.abs(found - want).max() < 2**-8 * np.abs(want).max()


def test_what_is_held_keeps_the_type_of_the_parameters():
    images = toy_images(2)
    source = make_source("bf16", images)
    (found,) = source.grid_vectors(
        images, [0], "query", Grid(2, 2), ["none"], phases=1, halves=True, seed=0, update=lambda n: None
    )
    assert found.vectors.dtype == torch.float32
    assert source.capture.arithmetic == torch.bfloat16


def test_small_output_gradients_survive_float16():
    """A loss weight of 2^-10, which float16 alone would round to nothing in most layers."""
    images = toy_images(2)
    table = grid_events(images, [0, 1], "train", Grid(4), 50, seed=0)
    table = replace(table, loss_weight=np.full(len(table), 2.0**-10, np.float32))
    vectors = torch.ones(1, make_source("no", images).layout.num_params)
    model = make_model(TOY_MODEL, images, seed=0).eval()
    want = make_source("no", images, model).dots(table, images, vectors, lambda n: None)
    found = make_source("fp16", images, model).dots(table, images, vectors, lambda n: None)
    np.testing.assert_allclose(found[1], want[1], rtol=5e-3)  # lengths; float16 has 11 bits


def test_scaled_outputs_leave_rows_and_sums_as_they_are(monkeypatch):
    images = toy_images(2)
    source = make_source("no", images)

    def taken():
        (sums,) = source.grid_vectors(
            images, [0], "query", Grid(2, 2), ["none", "timestep"], phases=1, halves=True, seed=0, update=lambda n: None
        )
        return [sums.vectors.numpy(), sums.norms]

    want = taken()
    monkeypatch.setattr("whence.gradients.output_scale", lambda name, num_elements: 256.0)
    for one, other in zip(taken(), want, strict=True):
        np.testing.assert_array_equal(one, other)  # a power of two takes part in no rounding


def test_a_power_of_two_near_the_number_of_elements():
    assert output_scale("fp16", 3 * 32 * 32) == 2048.0
    assert output_scale("bf16", 3 * 32 * 32) == output_scale("no", 3 * 32 * 32) == 1.0


def test_an_overflow_of_float16_is_named():
    images = toy_images(1)
    source = make_source("fp16", images)
    with torch.no_grad():
        source.model.conv_out.weight *= 1e7
    table = grid_events(images, [0], "train", Grid(1), 50, seed=0)
    with pytest.raises(NumericsError, match="train-0 at timestep 25 .*at checkpoint 7.*try autocast bf16"):
        source.dots(table, images, source.no_vectors(), lambda n: None)


def test_float64_with_autocast_is_refused():
    with pytest.raises(ConfigError, match="dtype float64 is for exact scores, and autocast bf16 rounds"):
        check_trace_settings(TraceSettings(dtype="float64", autocast="bf16"))


def test_an_unknown_type_is_refused():
    settings = TraceSettings()
    object.__setattr__(settings, "autocast", "fp8")
    with pytest.raises(ConfigError, match="Unknown autocast 'fp8'; known are no, bf16, fp16"):
        check_trace_settings(settings)


def test_tf32_without_a_gpu_warns():
    with pytest.warns(UserWarning, match="tf32 has no effect on cpu"):
        check_trace_settings(TraceSettings(tf32=True))


def test_tensor_float_32_is_off_in_a_pass_and_put_back(monkeypatch):
    images = toy_images(2)
    source = make_source("no", images)
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = (cudnn.allow_tf32, matmul.allow_tf32)
    seen = []
    source.model.register_forward_pre_hook(lambda *_: seen.append((cudnn.allow_tf32, matmul.allow_tf32)))
    source.check(images)
    assert set(seen) == {(False, False)}
    with pytest.raises(RuntimeError, match="in the middle"), tensor_float_32(True):
        assert cudnn.allow_tf32 and matmul.allow_tf32
        raise RuntimeError("in the middle")
    assert (cudnn.allow_tf32, matmul.allow_tf32) == before


def test_autocast_is_part_of_what_scores_depend_on(subject):
    specs = [subject.describe(subject.checkpoints, replace(SETTINGS, autocast=a)) for a in ("no", "bf16")]
    assert specs[0] != specs[1]


def test_uncovered_parameters_can_be_refused():
    images = toy_images(2)
    model = make_model(TOY_MODEL, images, seed=0).eval()
    model.register_parameter("stray", torch.nn.Parameter(torch.eye(8)))
    model.register_forward_pre_hook(lambda module, args: (args[0] @ module.stray, *args[1:]))
    with pytest.warns(UserWarning, match="stray"):
        make_source("no", images, model).check(images)
    with pytest.raises(UnsupportedModelError, match="Not covered.*stray"):
        make_source("no", images, model, uncovered="refuse").check(images)
