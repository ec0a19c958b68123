"""Slow and plain: the formulas of the papers, one event at a time, with whole gradients from autograd.

Everything fast is compared with this. It shares with the library only the record's columns and the noise of a key, and
reads the noise schedule off the diffusers scheduler.
"""

import numpy as np
import torch

from whence.diffusion.noise import noise_key, normals

OUTPUTS = {
    "squares": lambda y: y.square().mean(),
    "mean": lambda y: y.mean(),
    "l1": lambda y: y.abs().mean(),
    "l2": lambda y: y.square().mean().sqrt(),
    "max": lambda y: y.abs().max(),
}


def prediction_and_target(model, scheduler, image, timestep, noise):
    """What the network answers at one event, and what it should answer."""
    alpha_bar = scheduler.alphas_cumprod.double()[timestep]
    dtype = next(model.parameters()).dtype
    clean = torch.as_tensor(image)[None].to(dtype)
    noise = torch.as_tensor(noise)[None].to(dtype)
    noisy = (alpha_bar.sqrt() * clean + (1 - alpha_bar).sqrt() * noise).to(dtype)
    target = {
        "epsilon": noise,
        "sample": clean,
        "v_prediction": alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * clean,
    }[scheduler.config.prediction_type]
    return model(noisy, torch.tensor([timestep])).sample, target


def gradient(model, scheduler, image, timestep, noise, loss="mse", output="loss"):
    """Gradient of an output of one event over all trainable parameters, as one vector."""
    prediction, target = prediction_and_target(model, scheduler, image, timestep, noise)
    if output == "loss":
        error = prediction - target
        value = error.abs().mean() if loss == "l1" else error.square().mean()
    else:
        value = OUTPUTS[output](prediction)
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, parameters)]).detach()


def grid(num_timesteps, count):
    """``count`` timesteps from 1 to T - 1, rounded; one alone is the middle."""
    if count == 1:
        return [num_timesteps // 2]
    return [round(t) for t in np.linspace(1, num_timesteps - 1, count)]


def query_gradients(
    model, scheduler, image, sample_id, timesteps, draws, loss="mse", seed=0, side="query", output="loss"
):
    """Mean gradient over the draws at each timestep of the grid: METHODS 1.1, inner mean."""
    means = []
    for t in grid(scheduler.config.num_train_timesteps, timesteps):
        keys = [noise_key(seed, "grid", side, sample_id, t, draw) for draw in range(draws)]
        draws_of_t = [gradient(model, scheduler, image, t, normals(key, image.shape), loss, output) for key in keys]
        means.append(torch.stack(draws_of_t).mean(0))
    return torch.stack(means)


@torch.no_grad()
def mean_squared_error(model, scheduler, image, sample_id, timesteps, draws, seed=0, side="train"):
    """Mean squared error of the prediction over the events of a grid."""
    errors = []
    for t in grid(scheduler.config.num_train_timesteps, timesteps):
        for draw in range(draws):
            noise = normals(noise_key(seed, "grid", side, sample_id, t, draw), image.shape)
            prediction, target = prediction_and_target(model, scheduler, image, t, noise)
            errors.append(float((prediction - target).square().mean()))
    return np.mean(errors)


def visits_between(record, sample_id, after, upto):
    """Rows of the record of one sample, steps after+1..upto, in order."""
    sample = record.sample_ids.index(sample_id)
    return [
        v
        for v in range(len(record.visits))
        if record.visits.sample[v] == sample and after < record.visits.step[v] <= upto
    ]


def replay_scores(models, steps, scheduler, record, train, queries, *, normalise, replay, timesteps, draws, loss="mse"):
    """Diffusion-TracIn, or Diffusion-ReTrac where ``normalise``: one training event and one query at a time."""
    scores = np.zeros((len(queries), len(train)))
    visits = record.visits
    for model, after, upto in zip(models, [0, *steps], steps, strict=False):
        queried = []
        for image, query_id in zip(queries.pixels(range(len(queries))), queries.ids, strict=True):
            per_timestep = query_gradients(model, scheduler, image, query_id, timesteps, draws, loss)
            if normalise:
                per_timestep = per_timestep / per_timestep.norm(dim=1, keepdim=True)
            queried.append(per_timestep.mean(0))
        for row, sample_id in enumerate(train.ids):
            mine = visits_between(record, sample_id, after, upto)
            weights = [visits.learning_rate[v] * visits.clip_coefficient[v] / visits.samples_in_step[v] for v in mine]
            if replay == "last":
                mine, weights = mine[-1:], [sum(weights)]
            for v, weight in zip(mine, weights, strict=True):
                image = train.pixels([row])[0]
                image = image[..., ::-1].copy() if visits.flip[v] else image
                noise = normals(int(visits.noise_key[v]), image.shape)
                g = gradient(model, scheduler, image, int(visits.model_time[v]), noise, loss)
                g = g / g.norm() if normalise else g
                scores[:, row] += [weight * float(g @ q) for q in queried]
    return scores


def jacobian(model, scheduler, image, timestep, noise, parameters):
    """Jacobian of the prediction at one event, one row for each number of it."""
    prediction, _ = prediction_and_target(model, scheduler, image, timestep, noise)
    rows = []
    for value in prediction.flatten():
        gradients = torch.autograd.grad(value, parameters, retain_graph=True)
        rows.append(torch.cat([g.flatten() for g in gradients]))
    return torch.stack(rows)


def gauss_newton(model, scheduler, images, rows, timesteps, parameters, draws=1, seed=0):
    """Mean over the events of a grid of J^T (2/d) J, whole; and each event's part."""
    parts = []
    for row in rows:
        image = images.pixels([row])[0]
        for t in grid(scheduler.config.num_train_timesteps, timesteps):
            for draw in range(draws):
                noise = normals(noise_key(seed, "grid", "train", images.ids[row], t, draw), image.shape)
                rows_of_event = jacobian(model, scheduler, image, t, noise, parameters)
                parts.append(2 / len(rows_of_event) * rows_of_event.T @ rows_of_event)
    return torch.stack(parts).mean(0), parts
