# pyright: reportMissingImports=false, reportUntypedBaseClass=false, reportAttributeAccessIssue=false
"""The other side of benchmarks/agreement.py: the same scores by other libraries, or by the formula written out.

    python benchmarks/agreement_peers.py work CASE LIBRARY FOLDER      the process that agreement.py starts

Libraries know samples, not events. dattri and traker take a loss of our own, so a sample is all events of an image, and
its loss their mean. captum and kronfluence take each position on the first axis for a sample, so events are theirs, and
the scores of an image's events are averaged: all they compute is linear in the gradients of both sides.
"""

import json
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from agreement_formulas import (
    Handover,
    Output,
    events_of,
    flat,
    formula_dots,
    formula_replay,
    formula_ridge,
    gradients,
    output_of,
)
from measure import describe
from models import Inputs, predict, sample_losses
from peers import Predictor, dataset, with_math_attention
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader

Kind = Literal["kfac", "ekfac"]


def mean_over_events(scores: Tensor, case: Handover) -> Tensor:
    """Average the scores of events, (query event, train event), to those of samples."""
    return scores.unflatten(1, (len(case.train), -1)).mean(2).unflatten(0, (len(case.queries), -1)).mean(1)


def sample_output(model: nn.Module, weights: Any, sample: tuple[Tensor, ...], output: Output = "loss") -> Tensor:
    """Output of a sample, the mean over its events, as torch.func wants it."""
    noisy, timesteps, target = sample
    prediction = functional_call(model, weights, (noisy, timesteps), {"return_dict": False})[0]
    return output_of(prediction, target, output)


def dattri_dots(case: Handover, checkpoints: Literal["all", "last", "replay"], normalised: bool) -> Tensor:
    """TracInAttributor; for Diffusion-TracIn and ReTrac once at each checkpoint, as the events of each are its own."""
    from dattri.algorithm.tracin import TracInAttributor

    def attribute(steps: Sequence[int], train: Inputs, queries: Inputs) -> Tensor:
        task = dattri_task(case, steps)
        options = {"proj_type": "identity", "proj_dim": 1, "proj_max_batch_size": 32, "proj_seed": 0, "device": "cpu"}
        ones = torch.ones(len(steps))
        tracin = TracInAttributor(task, ones, normalized_grad=normalised, projector_kwargs=options)
        return tracin.attribute(*(DataLoader(dataset(i), len(i)) for i in (train, queries))).T.double()

    steps = list(range(case.num_checkpoints))
    if checkpoints != "replay":
        return attribute(steps if checkpoints == "all" else steps[-1:], case.train, case.queries)
    total = torch.zeros(())
    for step in steps:
        visits, weight = case.replay(step)
        of_units = attribute([step], visits, case.query_units)
        total = total + of_units.unflatten(0, (-1, case.query_timesteps)).mean(1) * weight
    return total


def dattri_task(case: Handover, steps: Sequence[int], output: Output = "loss") -> Any:
    """Say to dattri what is attributed."""
    from dattri.task import AttributionTask

    model = case.model()
    return AttributionTask(
        lambda weights, sample: sample_output(model, weights, sample, output),
        model,
        [case.weights(step) for step in steps],
    )


def dattri_trak(case: Handover, output: Output = "loss") -> Tensor:
    """TRAKAttributor without projection on one layer; Q, its factor for classifiers, is 1 everywhere."""
    from dattri.algorithm.trak import TRAKAttributor

    task = dattri_task(case, [case.num_checkpoints - 1], output)
    trak = TRAKAttributor(
        task,
        correct_probability_func=lambda weights, sample: sample[0].new_zeros(1),
        projector_kwargs={"proj_type": "identity", "proj_dim": 1, "device": "cpu"},
        layer_name=case.block,
        # Its gradients are divided by the root of the number of all parameters.
        regularization=ridge(case, output, case.block) / sum(p.numel() for p in case.model().parameters()),
    )
    trak.cache(DataLoader(dataset(case.train), len(case.train)))
    return trak.attribute(DataLoader(dataset(case.queries), len(case.queries))).T


def ridge(case: Handover, output: Output, names: Sequence[str] | None = None, matrix: Tensor | None = None) -> float:
    """Give the damping in the scale of gradients: a multiple of the mean eigenvalue."""
    phi = flat(gradients(case.model(), case.train, output, names))
    phi = phi if matrix is None else phi @ matrix
    return case.damping * float(phi.square().sum()) / len(phi)


def traker(case: Handover, where: Literal["block", "matrix"], output: Output = "loss") -> Tensor:
    """TRAKer on one layer without projection, or on all parameters with the matrix that is handed over.

    It divides the inverse by its mean absolute entry, so the scale of its scores has no meaning, and multiplies with
    the mean derivative of the loss in the output, which here is 1. Its features and its inverse are float32.
    """
    from trak import TRAKer
    from trak.modelout_functions import AbstractModelOutput
    from trak.projectors import AbstractProjector, NoOpProjector
    from trak.utils import vectorize

    class Value(AbstractModelOutput):
        def __init__(self):
            pass

        @staticmethod
        def get_output(model: nn.Module, weights: Any, buffers: Any, *sample: Tensor) -> Tensor:
            return sample_output(model, (weights, buffers), sample, output)

        def get_out_to_loss_grad(self, model: nn.Module, weights: Any, buffers: Any, batch: Any) -> Tensor:
            return torch.ones(len(batch[0]), 1)

    class Given(AbstractProjector):
        def __init__(self, *arguments: Any):
            super().__init__(*arguments)

        def project(self, grads: dict[str, Tensor], model_id: int) -> Tensor:
            return vectorize(grads, device="cpu").double() @ matrix

        def free_memory(self) -> None:
            pass

    model, matrix = case.model(), case.tensors["matrix"]
    names = case.block if where == "block" else [name for name, _ in model.named_parameters()]
    num_params = sum(p.numel() for name, p in model.named_parameters() if name in names)
    kind, width = (NoOpProjector, num_params) if where == "block" else (Given, matrix.shape[1])
    with tempfile.TemporaryDirectory() as folder:
        trak = TRAKer(
            model,
            Value(),
            train_set_size=len(case.train),
            save_dir=folder,
            device="cpu",
            projector=kind(num_params, width, 0, "given", "cpu"),
            proj_dim=width,
            use_half_precision=False,
            logging_level=logging.ERROR,
            grad_wrt=names,
            lambda_reg=ridge(case, output, names, None if where == "block" else matrix) / num_params,
        )
        trak.load_checkpoint(model.state_dict(), model_id=0)
        trak.featurize(list(case.train.tensors()), num_samples=len(case.train))
        trak.finalize_features()
        trak.start_scoring_checkpoint("queries", model.state_dict(), 0, num_targets=len(case.queries))
        trak.score(list(case.queries.tensors()), num_samples=len(case.queries))
        return torch.tensor(np.array(trak.finalize_scores("queries"))).double().T


def captum(case: Handover, checkpoints: Literal["all", "last"]) -> Tensor:
    """TracInCP, events as its samples."""
    from captum.influence import TracInCP

    model = Predictor(case.model())
    for parameter in model.parameters():
        parameter.register_hook(lambda gradient: gradient.contiguous())  # it flattens them with view()
    steps = list(range(case.num_checkpoints)) if checkpoints == "all" else [case.num_checkpoints - 1]

    def load(predictor: nn.Module, step: Any) -> float:
        predictor.net.load_state_dict(case.weights(step))
        return 1.0

    tracin = TracInCP(
        model,
        dataset(events_of(case.train)),
        checkpoints=steps,
        checkpoints_load_func=load,
        layers=list(model.layers()),
        loss_fn=lambda prediction, target: (prediction - target).square().flatten(1).mean(1),
        batch_size=64,
    )
    return mean_over_events(tracin.influence(events_of(case.queries).tensors()).double(), case)


def kronfluence(case: Handover, strategy: Literal["identity", "kfac", "ekfac"]) -> Tensor:
    """Pairwise scores over convolutions and linear layers, in float64, events as its samples.

    Factors are fitted to the residuals that are handed over: it leaves it to its Task to sample. Its damping of None is
    a tenth of each layer's mean eigenvalue. Its K-FAC averages the outer products of output gradients over positions,
    where an event's gradient is their sum: each layer's inverse is then too large by the number of its positions, and
    the scores of each layer are divided by it. Its EK-FAC is not concerned.
    """
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task

    class Loss(Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            noisy, timesteps, target = batch
            if sample:  # the batch is one of sampled residuals
                return (predict(model, noisy, timesteps) * target).sum()
            return sample_losses(model, Inputs(noisy, timesteps, target)).sum()

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return sample_losses(model, Inputs(*batch)).sum()

    assert case.damping == 0.1
    f64 = torch.float64
    factor_args = FactorArguments(
        strategy=strategy,
        activation_covariance_dtype=f64,
        gradient_covariance_dtype=f64,
        per_sample_gradient_dtype=f64,
        lambda_dtype=f64,
    )
    score_args = ScoreArguments(
        damping_factor=None,
        score_dtype=f64,
        per_sample_gradient_dtype=f64,
        precondition_dtype=f64,
        compute_per_module_scores=True,
    )
    model = prepare_model(case.model(), Loss())
    with tempfile.TemporaryDirectory() as folder:
        analyzer = Analyzer(
            "agreement", model, Loss(), cpu=True, output_dir=folder, disable_tqdm=True, log_level=logging.ERROR
        )
        sampled, train, queries = (
            dataset(i) for i in (sampled_residuals(case), events_of(case.train), events_of(case.queries))
        )
        analyzer.fit_all_factors(strategy, sampled, factor_args=factor_args, per_device_batch_size=32)
        analyzer.compute_pairwise_scores("scores", strategy, queries, train, 16, 32, score_args=score_args)
        found = analyzer.load_pairwise_scores("scores")
        positions = count_positions(case) if strategy == "kfac" else dict.fromkeys(found, 1)
        return mean_over_events(torch.stack([s.double() / positions[name] for name, s in found.items()]).sum(0), case)


@torch.no_grad()
def count_positions(case: Handover) -> dict[str, int]:
    """Count the positions of an event in each convolution and linear layer."""
    model, positions = case.model(), dict[str, int]()

    def note(output: Any, name: str, layer: Any) -> None:
        positions[name] = output[0].numel() // len(layer.weight)

    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(lambda layer, args, output, name=name: note(output, name, layer))
    sample_losses(model, events_of(case.train)[:1])
    return positions


def sampled_residuals(case: Handover) -> Inputs:
    """Give the events of the curvature, with residuals of variance 2/d in the place of targets."""
    sampled = case.inputs("sampled")
    return Inputs(sampled.noisy, sampled.timesteps, sampled.target * (2 / sampled.target[0].numel()) ** 0.5)


def curvlinops(
    case: Handover, kind: Kind, approximation: Literal["expand", "reduce"], fisher: Literal["given", "type-2"]
) -> Tensor:
    """KFACLinearOperator or EKFACLinearOperator, and KFACInverseLinearOperator, on gradients by autograd.

    ``given``: labels are handed over as its 'empirical' type takes them, prediction - residual with residuals of
    variance 1/2, which are the ones that its type 'mc' would draw. ``type-2``: it sums over all directions of the
    prediction. Its damping is one number, so each layer has operators of its own.
    """
    from curvlinops import EKFACLinearOperator, KFACInverseLinearOperator, KFACLinearOperator

    class Flat(nn.Module):
        def __init__(self, net: nn.Module):
            super().__init__()
            self.net = net

        def forward(self, x: dict[str, Tensor]) -> Tensor:
            return predict(self.net, x["noisy"], x["timesteps"]).flatten(1)

    model = Flat(case.model())
    predictor = Predictor(model.net)
    sampled = case.inputs("sampled")
    inputs = {"noisy": sampled.noisy, "timesteps": sampled.timesteps}
    with torch.no_grad():
        labels = model(inputs) - sampled.target.flatten(1) * 0.5**0.5
    operator = {"kfac": KFACLinearOperator, "ekfac": EKFACLinearOperator}[kind]
    total = torch.zeros(())
    layers = predictor.layers((nn.Conv2d, nn.Linear))
    if approximation == "reduce":
        layers = {name: layer for name, layer in layers.items() if not name.endswith(".to_k")}
    phi, psi = (gradients(model.net, i, names=layer_names(layers)) for i in (case.train, case.queries))
    for name, layer in layers.items():
        names = layer_names({name: layer})
        curvature = operator(
            model,
            nn.MSELoss(),
            list(layer.parameters()),
            [(inputs, labels)],
            check_deterministic=False,
            fisher_type="empirical" if fisher == "given" else fisher,
            kfac_approx=approximation,
            separate_weight_and_bias=False,
            num_data=len(labels),
            num_per_example_loss_terms=1,
            batch_size_fn=lambda x: len(x["noisy"]),
        )
        num_params = sum(p.numel() for p in layer.parameters())
        inverse = KFACInverseLinearOperator(
            curvature, damping=case.damping * float(curvature.trace) / num_params, use_exact_damping=True
        )
        columns = [psi[n].movedim(0, -1).contiguous() for n in names]
        solved = [column.movedim(-1, 0).flatten(1) for column in inverse @ columns]
        total = total + torch.cat(solved, 1) @ flat({n: phi[n] for n in names}).T
    return total


def layer_names(layers: Mapping[str, nn.Module]) -> list[str]:
    """Name the parameters of layers as the network does."""
    return [f"{path}.{own}".removeprefix("net.") for path, m in layers.items() for own, _ in m.named_parameters()]


@dataclass(frozen=True)
class Reference:
    """Scores of another side."""

    call: Callable[[Handover], Tensor]
    """Gives (query, train)."""
    how: str
    """What of it computes them."""


FORMULA = "formula"
REFERENCES: dict[tuple[str, str], Reference] = {
    ("tracin", FORMULA): Reference(lambda c: formula_replay(c, False, False), "written out"),
    ("tracin", "dattri"): Reference(lambda c: dattri_dots(c, "replay", False), "TracInAttributor at each checkpoint"),
    ("retrac", FORMULA): Reference(lambda c: formula_replay(c, True, False), "written out"),
    ("retrac", "dattri"): Reference(
        lambda c: dattri_dots(c, "replay", True), "TracInAttributor, normalised, a query's timesteps as samples"
    ),
    ("tracin-adam", FORMULA): Reference(lambda c: formula_replay(c, False, True), "written out"),
    ("retrac-adam", FORMULA): Reference(lambda c: formula_replay(c, True, True), "written out"),
    ("tracin-cp", FORMULA): Reference(lambda c: formula_dots(c, "all", False), "written out"),
    ("tracin-cp", "dattri"): Reference(lambda c: dattri_dots(c, "all", False), "TracInAttributor"),
    ("tracin-cp", "captum"): Reference(lambda c: captum(c, "all"), "TracInCP"),
    ("gas", FORMULA): Reference(lambda c: formula_dots(c, "all", True), "written out"),
    ("gas", "dattri"): Reference(lambda c: dattri_dots(c, "all", True), "TracInAttributor, normalised"),
    ("grad-dot", FORMULA): Reference(lambda c: formula_dots(c, "last", False), "written out"),
    ("grad-dot", "dattri"): Reference(lambda c: dattri_dots(c, "last", False), "TracInAttributor"),
    ("grad-dot", "captum"): Reference(lambda c: captum(c, "last"), "TracInCP"),
    ("grad-dot, known layers", "kronfluence"): Reference(lambda c: kronfluence(c, "identity"), "strategy identity"),
    ("grad-cos", FORMULA): Reference(lambda c: formula_dots(c, "last", True), "written out"),
    ("grad-cos", "dattri"): Reference(lambda c: dattri_dots(c, "last", True), "TracInAttributor, normalised"),
    ("trak", FORMULA): Reference(lambda c: formula_ridge(c), "written out"),
    ("trak, all checkpoints", FORMULA): Reference(lambda c: formula_ridge(c, checkpoints="all"), "written out"),
    ("trak, one layer", "traker"): Reference(lambda c: traker(c, "block"), "TRAKer, NoOpProjector"),
    ("trak, one layer", "dattri"): Reference(dattri_trak, "TRAKAttributor, identity"),
    ("trak, projected", "traker"): Reference(lambda c: traker(c, "matrix"), "TRAKer, our matrix as its projector"),
    ("d-trak", FORMULA): Reference(lambda c: formula_ridge(c, "squares"), "written out"),
    ("d-trak, one layer", "traker"): Reference(
        lambda c: traker(c, "block", "squares"), "TRAKer, NoOpProjector, output of our own"
    ),
    ("d-trak, one layer", "dattri"): Reference(
        lambda c: dattri_trak(c, "squares"), "TRAKAttributor, identity, output of our own"
    ),
    ("das", FORMULA): Reference(
        lambda c: formula_ridge(c, "mean", "residual", per_timestep=True, squared=True), "written out"
    ),
    ("das-signed", FORMULA): Reference(
        lambda c: formula_ridge(c, "mean", "residual", per_timestep=True), "written out"
    ),
    ("relatif", FORMULA): Reference(lambda c: formula_ridge(c, after="theta"), "written out"),
    ("relatif-l", FORMULA): Reference(lambda c: formula_ridge(c, after="l"), "written out"),
    ("renormalised", FORMULA): Reference(lambda c: formula_ridge(c, after="length"), "written out"),
    ("kfac, known layers", "kronfluence"): Reference(lambda c: kronfluence(c, "kfac"), "kfac, our residuals"),
    ("kfac, known layers", "curvlinops"): Reference(
        lambda c: curvlinops(c, "kfac", "expand", "given"), "KFACLinearOperator, our residuals"
    ),
    ("kfac reduce, known layers but keys", "curvlinops"): Reference(
        lambda c: curvlinops(c, "kfac", "reduce", "given"), "KFACLinearOperator reduce, our residuals"
    ),
    ("ekfac, known layers", "kronfluence"): Reference(lambda c: kronfluence(c, "ekfac"), "ekfac, our residuals"),
    ("ekfac, known layers", "curvlinops"): Reference(
        lambda c: curvlinops(c, "ekfac", "expand", "given"), "EKFACLinearOperator, our residuals"
    ),
}
"""By scores of ours and library."""
LIBRARIES = list(dict.fromkeys(library for _, library in REFERENCES))


def work(file: str, library: str, folder: str) -> None:
    """Compute all scores of a library, and write each, or what went wrong, to files of its own."""
    warnings.simplefilter("ignore")
    for name, reference in references_of(library).items():
        out = Path(folder) / name
        started_s = time.monotonic()
        try:
            found = with_math_attention(partial(reference.call, Handover(Path(file))))()
        except Exception as error:
            out.with_suffix(".json").write_text(json.dumps({"error": describe(error)}))
            continue
        np.save(out.with_suffix(".npy"), found.detach().numpy())
        out.with_suffix(".json").write_text(json.dumps({"seconds": time.monotonic() - started_s}))


def references_of(library: str) -> dict[str, Reference]:
    """Give what a library computes, by the name of our scores."""
    return {name: reference for (name, other), reference in REFERENCES.items() if other == library}


if __name__ == "__main__":
    work(*sys.argv[2:])
