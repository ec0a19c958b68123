"""Our paths through the gradient engine, and what one writes without it.

A path is one entry of ``PATHS``: a line on what it computes, and a function that prepares its run from a case.

    python benchmarks/paths.py work ...     the worker that benchmarks/engine.py starts
"""

from unittest import mock

import diffusers
import torch
from bounds import Work
from measure import GradientPath, Prepared, serve
from models import DRAWS, NUM_QUERIES, NUM_TIMESTEPS, Case, Inputs, each_gradient, flat_gradient, sample_losses
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from whence.data import ImageData
from whence.diffusion.adapters import ADAPTERS
from whence.diffusion.process import NoiseProcess
from whence.engine._base import numbers_at_once
from whence.engine.capture import AbstractSink, Capture
from whence.engine.sinks import DotSink, Layout, ProjectSink
from whence.event_table import EventBatch, grid_events, make_batch
from whence.gradients import GradientSource
from whence.methods.frame import Grid
from whence.projections import AbstractProjection, make_projection

TRACE_VECTORS = 176
"""Vectors of a trace of 16 queries by two methods: 4 phases and 1 half, 4 phases and 2 halves for each query."""
MEMORY_BYTES = 4 * 2**30
"""Memory for query vectors, as ``whence trace`` has it by default; what goes beyond takes another pass."""
ROW_WIDTH = 4096
ADAPTERS["UnlabelledDiT"] = ADAPTERS["UNet2DModel"]  # it is called as that one
QUERY_BATCHES = 2


class Passes:
    """Passes of the engine over fixed inputs."""

    def __init__(self, case: Case):
        self.case = case
        self.capture = Capture(case.model)
        self.layout = Layout.of(self.capture.parameters)

    def backward(self, inputs: Inputs, sink: AbstractSink) -> None:
        """Make one forward and backward pass, each sample a unit."""
        count = len(inputs)
        self.capture.run(lambda some: sample_losses(self.case.model, inputs[some]), count, count, [sink])

    def dots(self, vectors: Tensor) -> DotSink:
        """Multiply each gradient with vectors."""
        sink = DotSink(self.layout, vectors, self.case.batch_size)
        self.backward(self.case.train, sink)
        return sink

    def project(self, inputs: Inputs, projection: AbstractProjection, with_norms: bool) -> ProjectSink:
        """Project each gradient."""
        rows = torch.empty(len(inputs), projection.width, device=inputs.noisy.device)
        sink = ProjectSink(projection, rows, with_norms=with_norms)
        self.backward(inputs, sink)
        return sink


def row_projection(case: Case) -> AbstractProjection:
    """Make the default projection of a store."""
    shapes = {name: tuple(p.shape) for name, p in case.parameters.items()}
    return make_projection("two_sided_sketch", shapes, width=ROW_WIDTH, seed=0, device=case.inputs.noisy.device)


def rows(case: Case, with_norms: bool) -> Prepared:
    """Project to the rows of a store."""
    passes, projection = Passes(case), row_projection(case)

    def results() -> dict[str, Tensor]:
        train = passes.project(case.train, projection, with_norms)
        scores = train.rows @ passes.project(case.queries, projection, with_norms=False).rows.T
        return {"scores": scores, "norms": train.norm_squared.sqrt()} if with_norms else {"scores": scores}

    return Prepared(lambda: passes.project(case.train, projection, with_norms), case.batch_size, results)


def signal(case: Case) -> Prepared:
    """Run forwards and backwards with frozen weights: what every path adds to."""

    def run() -> None:
        for parameter in trainable:
            parameter.requires_grad_(False)
        noisy, timesteps, target = case.train.tensors()
        sample_losses(case.model, Inputs(noisy.clone().requires_grad_(), timesteps, target)).sum().backward()
        for parameter in trainable:
            parameter.requires_grad_(True)

    trainable = list(case.parameters.values())
    return Prepared(run, case.batch_size)


def traffic(case: Case) -> Prepared:
    """Write and read as many numbers as the gradients of a batch have, in pieces that stay in the cache of a CPU."""
    device = case.inputs.noisy.device
    piece = torch.empty(numbers_at_once(device), device=device)

    def run() -> None:
        for start in range(0, case.batch_size * case.num_params, len(piece)):
            part = piece[: case.batch_size * case.num_params - start]
            part.fill_(start)
            part.sum()

    return Prepared(run, case.batch_size)


def norms(case: Case) -> Prepared:
    """Take exact lengths alone."""
    passes = Passes(case)
    no_vectors = torch.empty(0, case.num_params, device=case.inputs.noisy.device)
    return Prepared(
        lambda: passes.dots(no_vectors),
        case.batch_size,
        lambda: {"norms": passes.dots(no_vectors).norm_squared.sqrt()},
    )


def query_dots(case: Case) -> Prepared:
    """Multiply with the gradients of the queries."""
    passes, vectors = Passes(case), each_gradient(case, case.queries)

    def results() -> dict[str, Tensor]:
        sink = passes.dots(vectors)
        return {"scores": sink.dots, "norms": sink.norm_squared.sqrt()}

    return Prepared(lambda: passes.dots(vectors), case.batch_size, results)


def trace_dots(case: Case) -> Prepared:
    """Multiply with all vectors of a trace, in turns where they do not fit into memory."""
    passes = Passes(case)
    turns = num_turns(case.num_params)
    vectors = torch.randn(-(-TRACE_VECTORS // turns), case.num_params, device=case.inputs.noisy.device)

    def run() -> None:
        for _ in range(turns):
            passes.dots(vectors)

    return Prepared(run, case.batch_size)


def num_turns(num_params: int) -> int:
    """Count the passes in which the vectors of a trace take their turns."""
    return -(-TRACE_VECTORS * num_params * 4 // MEMORY_BYTES)


def query_side(case: Case) -> Prepared:
    """Sum gradients over a grid as for a query: phases, halves, with and without norms."""
    images, process = _images(case), _process()
    batch_size = len(case.query_batch)
    source = GradientSource(case.model, process, "mse", batch_size, "the benchmark")
    noisy, timesteps, target = case.query_batch.tensors()
    weight = torch.ones(batch_size, device=noisy.device)
    batch = EventBatch(noisy, noisy, noisy, target, timesteps, timesteps, {}, weight, weight)
    grid = Grid(timesteps=QUERY_BATCHES * batch_size // DRAWS, draws=DRAWS)

    def run() -> None:
        with mock.patch("whence.gradients.make_batch", lambda *args, **options: batch):
            source.grid_vectors(
                images,
                [0],
                "query",
                grid,
                ["none", "timestep"],
                phases=min(4, grid.timesteps),
                halves=True,
                seed=0,
                update=lambda count: None,
            )

    return Prepared(run, QUERY_BATCHES * batch_size)


def noise(case: Case) -> Prepared:
    """Make the inputs of a batch from its keys; no network runs."""
    images, process = _images(case), _process()
    rows = range(case.batch_size)
    table = grid_events(images, rows, "train", Grid(timesteps=1), NUM_TIMESTEPS, seed=0)
    device = case.inputs.noisy.device
    return Prepared(lambda: make_batch(table, images, process, device=device), case.batch_size)


def materialised(case: Case) -> Prepared:
    """Take all gradients of a batch at once with torch.func."""
    weights = {name: p.detach() for name, p in case.parameters.items()}

    def loss(weights: dict[str, Tensor], noisy: Tensor, timestep: Tensor, target: Tensor) -> Tensor:
        arguments = (noisy[None], timestep[None])
        prediction = functional_call(case.model, weights, arguments, {"return_dict": False})[0]
        return (prediction - target).square().mean()

    gradients = vmap(grad(loss), in_dims=(None, 0, 0, 0))

    def run(inputs: Inputs) -> dict[str, Tensor]:
        with sdpa_kernel(SDPBackend.MATH):  # the others have no batching rule
            return gradients(weights, *inputs.tensors())

    def results() -> dict[str, Tensor]:
        train, queries = (
            torch.cat([g.flatten(1) for g in run(inputs).values()], dim=1) for inputs in (case.train, case.queries)
        )
        return {"scores": train @ queries.T, "norms": train.double().norm(dim=1)}

    return Prepared(lambda: run(case.train), case.batch_size, results)


def one_by_one(case: Case) -> Prepared:
    """Take gradients as the paper's algorithm does."""
    vectors = each_gradient(case, case.queries)

    def results() -> dict[str, Tensor]:
        gradients = (flat_gradient(case, case.train[k : k + 1]) for k in range(case.batch_size))
        pairs = [(vectors @ gradient, gradient.double().norm()) for gradient in gradients]
        scores, lengths = (torch.stack(column) for column in zip(*pairs, strict=True))
        return {"scores": scores, "norms": lengths}

    return Prepared(results, case.batch_size, results)


def _process() -> NoiseProcess:
    return NoiseProcess.from_scheduler(diffusers.DDPMScheduler(num_train_timesteps=NUM_TIMESTEPS))


def _images(case: Case) -> ImageData:
    pixels = case.train.noisy.clamp(-1, 1).cpu().numpy()
    return ImageData.from_arrays(pixels, [f"image-{k}" for k in range(len(pixels))])


EXACT = "batch-of-one loop"
"""The path that the results of all others are compared with."""

DOTS_HERE, DOTS_TRACE = f"exact dots, {NUM_QUERIES} vectors", f"exact dots, {TRACE_VECTORS} vectors"
NUM_SUMS = TRACE_VECTORS // NUM_QUERIES

SIGNAL, TRAFFIC = "signal alone", "traffic of gradients"

PATHS: dict[str, GradientPath] = {
    "projected rows": GradientPath(
        f"rows of width {ROW_WIDTH:,}, no norms",
        lambda case: rows(case, False),
        work=lambda cost: cost.rows,
    ),
    "projected rows, exact norms": GradientPath(
        f"rows of width {ROW_WIDTH:,}, and lengths",
        lambda case: rows(case, True),
        work=lambda cost: cost.rows_and_norms,
    ),
    "exact norms": GradientPath("lengths of all gradients", norms, work=lambda cost: cost.norms),
    DOTS_HERE: GradientPath(
        f"scores of {NUM_QUERIES} queries by one method, and lengths",
        query_dots,
        work=lambda cost: Work(cost.weights + 2 * cost.num_params * NUM_QUERIES, made=1),
    ),
    DOTS_TRACE: GradientPath(
        f"all that `whence trace` takes for {NUM_QUERIES} queries by two methods",
        trace_dots,
        work=lambda cost: Work(
            num_turns(cost.num_params) * cost.weights + 2 * cost.num_params * TRACE_VECTORS,
            made=1,
            passes=num_turns(cost.num_params),
        ),
    ),
    "query side": GradientPath(
        f"sums over timesteps x {DRAWS} draws, by phase and half",
        query_side,
        query_side=True,
        work=lambda cost: Work(cost.weights + 2 * cost.num_params * NUM_SUMS * 2 / DRAWS, made=2 / DRAWS),
    ),
    "vmap(grad)": GradientPath(
        "all gradients of the batch, in memory", materialised, work=lambda cost: Work(cost.weights, made=1)
    ),
    EXACT: GradientPath(
        f"gradient, length and {NUM_QUERIES} dots, a sample at a time",
        one_by_one,
        work=lambda cost: Work(cost.weights + 2 * cost.num_params * NUM_QUERIES, made=1),
    ),
    SIGNAL: GradientPath("forward and backward pass with frozen weights: a part of every path", signal),
    TRAFFIC: GradientPath("as many numbers as all gradients of the batch, written and read once", traffic),
    "make_batch": GradientPath("noise and noisy images from their keys, no network", noise),
}

if __name__ == "__main__":
    serve(PATHS)
