"""Scaling of latents, worked by hand."""

from types import SimpleNamespace

import pytest
import torch

from whence.diffusion.latents import latent_scaling


@pytest.mark.parametrize(
    ("config", "want"),
    [
        ({"scaling_factor": 0.5}, 1.5),  # 3 x 0.5
        ({"scaling_factor": 0.5, "shift_factor": 1.0}, 1.0),  # (3 - 1) x 0.5
        ({"scaling_factor": None, "shift_factor": None}, 3.0),
        ({"scaling_factor": 0.5, "latents_mean": None, "latents_std": None}, 1.5),
    ],
)
def test_one_shift_and_scale_for_all_channels(config, want):
    shift, scale = latent_scaling(SimpleNamespace(**config))
    assert float((torch.tensor(3.0) - shift) * scale) == want


def test_channels_with_a_mean_and_a_deviation_are_standardised():
    config = SimpleNamespace(scaling_factor=0.5, shift_factor=9.0, latents_mean=[1.0, 2.0], latents_std=[2.0, 0.25])
    shift, scale = latent_scaling(config)
    latents = torch.full((1, 2, 3, 3), 3.0)
    want = torch.tensor([0.5, 2.0])  # (3 - 1) / 2 x 0.5, (3 - 2) / 0.25 x 0.5
    assert torch.equal((latents - shift) * scale, want.view(1, 2, 1, 1).expand(1, 2, 3, 3))
