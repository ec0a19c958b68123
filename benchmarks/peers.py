# pyright: reportMissingImports=false, reportUntypedBaseClass=false
"""Other libraries at the same task, in an environment of their own with the versions of peers-constraints.txt.

    python benchmarks/peers.py install      make benchmarks/.venv-peers; benchmarks/engine.py does so at its first use
    python benchmarks/peers.py work ...     the worker that benchmarks/engine.py starts there

Each gets what suits it best here: fixed noisy images, timesteps and targets as tensors, whole batches, float32, and
attention in the form that it can differentiate. What it makes once for a model (a projection matrix that it can keep,
the files it starts from) is not measured. Where it takes the queries' gradients in the same call, they count as
samples.
"""

import logging
import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from measure import GradientPath, Prepared, serve
from models import NUM_QUERIES, Case, Inputs, predict, sample_losses
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import ConcatDataset, DataLoader, TensorDataset

HERE = Path(__file__).parent
ENVIRONMENT = HERE / ".venv-peers"
PYTHON = ENVIRONMENT / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

PACKAGES = "torch diffusers transformers traker dattri captum opacus".split()
DEPENDENCIES = "accelerate datasets einops einconv opt_einsum simple-parsing jaxtyping natsort ml_dtypes peft petname"
WITHOUT_DEPENDENCIES = "kronfluence bergson torchopt optree graphviz bitsandbytes".split()
WITHOUT_DEPENDENCIES += "curvlinops-for-pytorch backpack-for-pytorch linear_operator".split()
"""Packages that name torchvision, or a range of torch, which would break the environment of all others."""

PROJ_DIM = 512
BATCHES = 8
"""Batches of training samples in one call, of libraries that take the queries' gradients once for all of them."""
KEPT_BYTES = 4 * 2**30
"""The largest projection matrix that is kept in memory."""


def install() -> None:
    """Make the environment, unless it is there."""
    stamp = ENVIRONMENT / "installed.txt"
    constraints = HERE / "peers-constraints.txt"
    if stamp.exists() and stamp.read_text() == constraints.read_text():
        return
    if not PYTHON.exists():
        venv.create(ENVIRONMENT, with_pip=True)
    pip = [str(PYTHON), "-m", "pip", "install", "--quiet", "-c", str(constraints)]
    subprocess.run([*pip, *PACKAGES, *DEPENDENCIES.split()], check=True)
    subprocess.run([*pip, "--no-deps", *WITHOUT_DEPENDENCIES], check=True)
    stamp.write_text(constraints.read_text())


def versions(libraries: Iterable[str]) -> dict[str, str]:
    """Read the versions of libraries, and of torch beside them; nothing if there are none."""
    names = list(libraries)
    lines = (HERE / "peers-constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line)
    return {name: pins[name] for name in names} | ({"torch (peers)": pins["torch"]} if names else {})


class Predictor(nn.Module):
    """The network with one tensor as its output."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """Run the network."""
        return predict(self.net, noisy, timesteps)

    def layers(self, kinds: tuple[type[nn.Module], ...] = (nn.Module,)) -> dict[str, nn.Module]:
        """Name the layers with parameters of their own that are trained."""
        return {
            name: layer
            for name, layer in self.named_modules()
            if isinstance(layer, kinds) and any(p.requires_grad for p in layer.parameters(recurse=False))
        }


def num_params(layers: Iterable[nn.Module]) -> int:
    """Count the parameters of layers."""
    return sum(p.numel() for layer in layers for p in layer.parameters(recurse=False))


def dataset(inputs: Inputs) -> TensorDataset:
    """Give inputs the form that libraries read."""
    return TensorDataset(*inputs.tensors())


def one_loss(model: nn.Module, weights: Any, sample: tuple[Tensor, ...]) -> Tensor:
    """Loss of one sample, as torch.func wants it."""
    noisy, timestep, target = sample
    prediction = functional_call(model, weights, (noisy[None], timestep[None]), {"return_dict": False})[0]
    return (prediction - target).square().mean()


def opacus(case: Case) -> Prepared:
    from opacus import GradSampleModule

    for layer in Predictor(case.model).layers().values():
        layer.training = True  # it captures nothing else; there is no dropout in these layers
        if isinstance(layer, nn.Conv2d):
            # It unfolds by strides, and gets a wrong gradient from an input that is not contiguous.
            layer.register_forward_pre_hook(lambda layer, args: (args[0].contiguous(), *args[1:]))
    model = GradSampleModule(case.model, loss_reduction="sum", strict=False)

    parameters: list[Any] = list(case.parameters.values())

    def run(inputs: Inputs) -> list[Tensor]:
        sample_losses(model, inputs).sum().backward()
        gradients = [parameter.grad_sample for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
            parameter.grad_sample = None
        return gradients

    def results() -> dict[str, Tensor]:
        train, queries = (torch.cat([g.flatten(1) for g in run(i)], dim=1) for i in (case.train, case.queries))
        return {"scores": train @ queries.T}

    return Prepared(lambda: run(case.train), case.batch_size, results)


def captum(case: Case, sample_wise: bool) -> Prepared:
    from captum.influence import TracInCP

    model = Predictor(case.model)
    # Its faster form knows two kinds of layers, whose input must depend on what the network is given by gradients.
    fast = {n: m for n, m in model.layers((nn.Conv2d, nn.Linear)).items() if not n.endswith("linear_1")}
    layers = fast if sample_wise else model.layers()

    batches = BATCHES if sample_wise else 1

    def loss(prediction: Tensor, target: Tensor) -> Tensor:
        losses = (prediction - target).square().flatten(1).mean(1)
        return losses.sum() if sample_wise else losses

    tracin = TracInCP(
        model,
        ConcatDataset([dataset(case.train)] * batches),
        checkpoints=["the weights as they are"],
        checkpoints_load_func=lambda model, checkpoint: 1.0,
        layers=list(layers),
        loss_fn=loss,
        batch_size=case.batch_size,
        sample_wise_grads_per_batch=sample_wise,
    )

    def run() -> Tensor:
        return tracin.influence(case.queries.tensors())

    return Prepared(
        run,
        batches * case.batch_size + NUM_QUERIES,
        lambda: {"scores": run().T[: case.batch_size]},
        num_params=num_params(layers.values()),
    )


def dattri(case: Case, method: str, projector: dict[str, Any]) -> Prepared:
    from dattri.algorithm.tracin import TracInAttributor
    from dattri.algorithm.trak import TRAKAttributor
    from dattri.task import AttributionTask

    frozen = {name: p for name, p in case.model.named_parameters() if not p.requires_grad}
    task = AttributionTask(
        lambda weights, sample: one_loss(case.model, frozen | weights, sample), case.model, case.model.state_dict()
    )
    device = str(case.inputs.noisy.device)
    options = {"proj_dim": PROJ_DIM, "proj_max_batch_size": 32, "proj_seed": 0, "device": device} | projector
    train, queries = (DataLoader(dataset(i), len(i)) for i in (case.train, case.queries))
    if method == "trak":
        # With so large a ridge its scores are proportional to inner products of features.
        trak = TRAKAttributor(
            task,
            correct_probability_func=lambda weights, sample: sample[0].new_zeros(1),
            projector_kwargs=options,
            device=device,
            regularization=1e6,
        )

        def results() -> dict[str, Tensor]:
            trak.cache(train)
            return {"scores": trak.attribute(queries)}

        return Prepared(with_math_attention(lambda: trak.cache(train)), case.batch_size, with_math_attention(results))

    tracin = TracInAttributor(task, torch.ones(1), normalized_grad=False, projector_kwargs=options, device=device)
    run = with_math_attention(lambda: tracin.attribute(train, queries))
    return Prepared(run, case.batch_size + NUM_QUERIES, lambda: {"scores": run()})


def traker(case: Case, keep: bool) -> Prepared:
    from trak import TRAKer
    from trak.modelout_functions import AbstractModelOutput
    from trak.projectors import BasicProjector, ProjectionType

    class Loss(AbstractModelOutput):
        def __init__(self):
            pass

        @staticmethod
        def get_output(model: nn.Module, weights: Any, buffers: Any, *sample: Tensor) -> Tensor:
            return one_loss(model, (weights, buffers), sample)

        def get_out_to_loss_grad(self, model: nn.Module, weights: Any, buffers: Any, batch: list[Tensor]) -> Tensor:
            return torch.ones(len(batch[0]), 1)

    if keep and PROJ_DIM * case.num_params * 4 > KEPT_BYTES:
        size_gib = PROJ_DIM * case.num_params * 4 / 2**30
        raise ValueError(f"a projection matrix of {size_gib:.0f} GiB is not kept in memory")
    device = str(case.inputs.noisy.device)
    block = {"block_size": PROJ_DIM} if keep else {}  # of one block, the matrix stays; else it is drawn for each batch
    projector = BasicProjector(case.num_params, PROJ_DIM, 0, ProjectionType.rademacher, device, **block)
    folder = tempfile.TemporaryDirectory()
    trak = TRAKer(
        case.model,
        Loss(),
        train_set_size=case.batch_size,
        save_dir=folder.name,
        device=device,
        projector=projector,
        proj_dim=PROJ_DIM,
        use_half_precision=False,
        logging_level=logging.ERROR,
        grad_wrt=list(case.parameters),
    )
    trak.load_checkpoint(case.model.state_dict(), model_id=0)

    def run(held: Any = folder) -> None:
        trak.saver.current_store["is_featurized"][:] = 0
        trak._last_ind = 0  # noqa: SLF001
        trak.featurize(list(case.train.tensors()), num_samples=case.batch_size)

    def results() -> dict[str, Tensor]:
        run()
        features = torch.tensor(trak.saver.current_store["grads"], device=device)
        gradients = trak.gradient_computer.compute_per_sample_grad(list(case.queries.tensors()))
        return {"scores": features @ projector.project(gradients, 0).T}

    return Prepared(with_math_attention(run), case.batch_size, with_math_attention(results))


def kronfluence(case: Case) -> Prepared:
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments
    from kronfluence.task import Task

    class Loss(Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            return sample_losses(model, Inputs(*batch)).sum()

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return sample_losses(model, Inputs(*batch)).sum()

    covered = num_params(Predictor(case.model).layers((nn.Conv2d, nn.Linear)).values())
    model = prepare_model(case.model, Loss())
    folder = tempfile.TemporaryDirectory()
    on_cpu = case.inputs.noisy.device.type == "cpu"
    analyzer = Analyzer(
        "benchmark", model, Loss(), cpu=on_cpu, output_dir=folder.name, disable_tqdm=True, log_level=logging.ERROR
    )
    # Several batches, as every call starts with a second of its own.
    train, queries = ConcatDataset([dataset(case.train)] * BATCHES), dataset(case.queries)
    identity = FactorArguments(strategy="identity")
    analyzer.fit_all_factors("identity", train, factor_args=identity, per_device_batch_size=case.batch_size)

    def run(held: Any = folder) -> None:
        analyzer.compute_pairwise_scores(
            "scores", "identity", queries, train, NUM_QUERIES, case.batch_size, overwrite_output_dir=True
        )

    def results() -> dict[str, Tensor]:
        run()
        return {"scores": analyzer.load_pairwise_scores("scores")["all_modules"].T[: case.batch_size]}

    return Prepared(run, BATCHES * case.batch_size + NUM_QUERIES, results, num_params=covered)


def bergson(case: Case) -> Prepared:
    from bergson import GradientProcessor, IndexConfig, InMemoryCollector
    from datasets import Dataset

    model: Any = Predictor(case.model)
    model.device = case.inputs.noisy.device
    layers = {name: m for name, m in model.layers((nn.Linear,)).items() if m in token_layers(case)}

    def run(inputs: Inputs) -> dict[str, Tensor]:
        count = len(inputs)
        collector = InMemoryCollector(
            model=model,
            data=Dataset.from_dict({"length": [1] * count}),
            cfg=IndexConfig(run_path="unused"),
            processor=GradientProcessor(projection_dim=None, include_bias=True),
            target_modules=set(layers),
        )
        with collector:
            losses = sample_losses(case.model, inputs)
            losses.sum().backward()
            collector.process_batch(list(range(count)), losses=losses)
        collector.teardown()
        case.model.zero_grad()
        return collector.gradients

    def results() -> dict[str, Tensor]:
        train, queries = (torch.cat([g.flatten(1) for g in run(i).values()], 1) for i in (case.train, case.queries))
        return {"scores": train @ queries.T}

    return Prepared(lambda: run(case.train), case.batch_size, results, num_params=num_params(layers.values()))


def token_layers(case: Case) -> set[nn.Module]:
    """Find the layers whose input has the three axes sample, token, feature: bergson takes no others."""
    found: set[nn.Module] = set()

    def look(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if args[0].ndim == 3:
            found.add(layer)

    handles = [layer.register_forward_hook(look) for layer in case.model.modules() if isinstance(layer, nn.Linear)]
    with torch.no_grad():
        sample_losses(case.model, case.train[:1])
    for handle in handles:
        handle.remove()
    return found


def with_math_attention(run: Callable[[], Any]) -> Callable[[], Any]:
    """Let attention be computed in steps that torch.func knows how to batch."""

    def run_so() -> Any:
        with sdpa_kernel(SDPBackend.MATH):
            return run()

    return run_so


FEATURES, GRADIENTS, DOTS = f"features of width {PROJ_DIM}", "all gradients of the batch, in memory", "exact dots"
KNOWN_LAYERS = f"{DOTS} over convolutions and linear layers"
PATHS: dict[str, GradientPath] = {
    "opacus GradSampleModule": GradientPath(GRADIENTS, opacus),
    "captum TracInCP": GradientPath(f"{DOTS}, a backward pass for each sample", lambda case: captum(case, False)),
    "captum TracInCP, sample-wise": GradientPath(KNOWN_LAYERS, lambda case: captum(case, True)),
    "kronfluence pairwise, identity": GradientPath(KNOWN_LAYERS, kronfluence),
    "bergson InMemoryCollector": GradientPath("all gradients of linear layers that see tokens", bergson),
    "traker TRAKer": GradientPath(f"{FEATURES}, matrix drawn for each batch", lambda case: traker(case, False)),
    "traker TRAKer, matrix kept": GradientPath(f"{FEATURES}, matrix beside the model", lambda case: traker(case, True)),
    "dattri TracIn, identity": GradientPath(DOTS, lambda case: dattri(case, "tracin", {"proj_type": "identity"})),
    "dattri TracIn": GradientPath(f"dots of {FEATURES}", lambda case: dattri(case, "tracin", {})),
    "dattri TRAK": GradientPath(FEATURES, lambda case: dattri(case, "trak", {})),
}

if __name__ == "__main__":
    if sys.argv[1:] == ["install"]:
        install()
    else:
        serve(PATHS)
