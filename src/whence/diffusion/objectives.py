"""Output functions: one number per event, whose gradient is attributed.

Every loss is the mean over the elements of one sample, so that its size does not depend on the resolution, and a batch
mean of it is what ``diffusers`` training scripts minimise. Outputs other than the loss are functions of the prediction
alone (D-TRAK: Zheng et al. 2024, arXiv:2311.00500), for v and x0 prediction as for that of the noise:

    squares   mean of y^2      D-TRAK's own                  l1    mean of |y|
    mean      mean of y        DAS's (Lin et al. 2025)       l2    root of the mean of y^2
                                                             max   largest |y|
"""

from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from whence.config import LossName, OutputName
from whence.diffusion.process import NoiseProcess
from whence.errors import ConfigError, check_choice


def sample_loss(
    prediction: Float[Tensor, "event *shape"],
    target: Float[Tensor, "event *shape"],
    loss: LossName,
    region: Float[Tensor, "event height width"] | None = None,
) -> Float[Tensor, " event"]:
    """Compare predictions with targets.

    Args:
        prediction: What the network gave.
        target: What it should have given.
        loss: ``mse`` for the mean squared, ``l1`` for the mean absolute error.
        region: Weight of each place, if the mean is not over all of them alike.

    Returns:
        One loss per event.

    Raises:
        ConfigError: If the loss is unknown.
    """
    error = prediction - target
    match loss:
        case "mse":
            elements = error.square()
        case "l1":
            elements = error.abs()
        case unknown:
            raise ConfigError(f"Unknown loss {unknown!r}; known are {', '.join(get_args(LossName))}.")
    return _mean(elements, region)


def _mean(elements: Tensor, region: Tensor | None) -> Float[Tensor, " event"]:
    """Average over the elements of each event, weighted by its region."""
    if region is None:
        return elements.flatten(start_dim=1).mean(dim=1)
    weights = region[:, None].to(elements)
    return (elements * weights).flatten(1).sum(1) / (weights.flatten(1).sum(1) * elements.shape[1])


def sample_output(
    prediction: Float[Tensor, "event *shape"],
    target: Float[Tensor, "event *shape"],
    output: OutputName,
    loss: LossName,
    region: Float[Tensor, "event height width"] | None = None,
) -> Float[Tensor, " event"]:
    """Make one number of each prediction.

    Args:
        prediction: What the network gave.
        target: What it should have given; of no account but for the loss.
        output: Output function.
        loss: Training loss.
        region: Weight of each place, if not all of them count alike.

    Returns:
        One number per event.

    Raises:
        ConfigError: If the output or the loss is unknown.
    """
    match output:
        case "loss":
            return sample_loss(prediction, target, loss, region)
        case "squares":
            return _mean(prediction.square(), region)
        case "mean":
            return _mean(prediction, region)
        case "l1":
            return _mean(prediction.abs(), region)
        case "l2":
            kept = prediction if region is None else prediction * region[:, None].to(prediction).sqrt()
            count = prediction[0].numel() if region is None else region.flatten(1).sum(1) * prediction.shape[1]
            return torch.linalg.vector_norm(kept.flatten(1), dim=1) / count**0.5
        case "max":
            kept = prediction if region is None else prediction * (region[:, None] > 0)
            return kept.flatten(1).abs().amax(dim=1)
        case unknown:
            raise ConfigError(f"Unknown output {unknown!r}; known are {', '.join(get_args(OutputName))}.")


BoundName = Literal["simplified_elbo", "elbo"]


def bound_weights(process: NoiseProcess, bound: BoundName) -> Float[Tensor, " timestep"]:
    r"""Weigh the squared error of a prediction at each timestep as the variational bound of DDPM does.

    With :math:`\bar\alpha_t` for alpha squared, and an error of the predicted noise,

        simplified_elbo   beta_t / (2 alpha_t (1 - abar_t))         variance of a reverse step beta_t
        elbo              beta_t / (2 alpha_t (1 - abar_(t-1)))     variance that of the posterior: the exact bound

    (Ho et al. 2020, arXiv:2006.11239, equation 12, without its decoder term at timestep 0, where the weight of ``elbo``
    is infinite and 0 stands here). An error of a velocity or a clean image is turned into one of the noise.

    Args:
        process: The noising process.
        bound: Which of the two.

    Returns:
        Weights in float64; the sum over timesteps of weight x squared error is in nats. Infinite where a schedule ends
        without signal and the model predicts noise, and for flow matching and EDM, which have no such bound.

    Raises:
        ConfigError: If the bound is unknown.
    """
    check_choice("bound", bound, BoundName)
    if process.prediction_type in ("flow", "edm"):
        return torch.full_like(process.alpha, torch.inf)
    signal, noise = process.alpha.square(), process.sigma.square()
    signal_before = torch.cat([torch.ones_like(signal[:1]), signal[:-1]])
    noise_before = torch.cat([torch.zeros_like(noise[:1]), noise[:-1]])
    # beta_t / alpha_t times the squared error of the noise by that of the prediction, without 0 / 0 where abar_t is 0.
    ratio = {"epsilon": 1 / signal, "v_prediction": torch.ones_like(signal), "sample": 1 / noise}
    common = (signal_before - signal) * ratio[process.prediction_type] / 2
    if bound == "simplified_elbo":
        return common / noise
    return torch.where(noise_before > 0, common / noise_before, torch.zeros_like(common))
