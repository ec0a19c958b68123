"""Whether scores are those of other libraries, and of the formula written out, on the same model and the same events.

    python benchmarks/agreement.py --json agreement.json --markdown docs/results/agreement.md     minutes on two cores
    python benchmarks/agreement.py --no-peers                                                     formulas alone

A small UNet2DModel is trained on bundled images, with a record. Our scores go the way of ``whence trace`` and of
``whence index`` and ``whence query``. Weights and events (noisy images, timesteps, targets) are then handed over to
other libraries, each in a process of its own in the environment of ``benchmarks/peers.py``
(``benchmarks/agreement_peers.py``), and to the formulas written out with autograd in float64
(``benchmarks/agreement_formulas.py``).

Definitions are brought to one formula before anything is compared:

- An image's gradient is the mean over its events. Libraries that take events for samples are averaged over them.
- Dampings are 0.1 of a mean eigenvalue: of the training gradients' Gram matrix (TRAK), of each layer's curvature
  (K-FAC). traker and dattri divide gradients by the root of the number of parameters, so their damping is divided by
  that number.
- The residuals of K-FAC and EK-FAC are drawn once, by us, and handed over; positions are samples of their own
  (expand), biases the last column of a layer's weight. With the sum over positions (reduce) the keys of attention are
  left out: a softmax does not see what is added to all keys, so their summed gradient is zero, and what an inverse
  makes of its rounding differs from one computation to the next.
- kronfluence's K-FAC takes means over positions on both sides, which is undone (``kronfluence`` in
  ``benchmarks/agreement_peers.py``).

What remains is a factor that is the same for all scores; it is fitted to the whole table and reported. Measured are, of
each query, Spearman's correlation over training images, of which the smallest is given, and the length of the
difference relative to that of the reference. Ends with status 1 where a correlation is not above 0.999.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import peers
import torch
from agreement_peers import FORMULA, LIBRARIES, references_of
from numpy import ndarray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from workers import OURS

from engine import describe_machine, distance, spearman
from whence.attribution import trace
from whence.checkpoints import list_checkpoints, load_model
from whence.config import DataSettings, IndexSettings, ModelSettings, QuerySettings, TraceSettings, TrainingSettings
from whence.data import ImageData, open_images
from whence.diffusion.noise import normals_of_keys
from whence.event_table import EventBatch, grid_events, make_batch
from whence.indexing import index
from whence.methods import (
    D_TRAK,
    DAS,
    DAS_SIGNED,
    EKFAC,
    GAS,
    GRAD_COS,
    GRAD_DOT,
    KFAC,
    RELATIF,
    RELATIF_L,
    RENORMALISED,
    RETRAC,
    RETRAC_ADAM,
    TRACIN,
    TRACIN_ADAM,
    TRACIN_CP,
    TRAK,
    Grid,
    Method,
    Replay,
)
from whence.methods.frame import KroneckerInverse
from whence.projections import make_projection
from whence.querying import query
from whence.record import Record
from whence.subject import Subject
from whence.training import train

HERE = Path(__file__).parent
LIMIT_S = 1200
"""A reference that takes longer is stopped."""
BOUND = 0.999
DAMPING = 0.1
TIMESTEPS, DRAWS = 3, 2
"""Of the grids of both sides."""
CURVATURE_EVENTS = Grid(timesteps=2)
WIDTH = 256
"""Of the projection that is handed over."""
BLOCK = ("mid_block.resnets.0.conv1.*",)
"""Parameters of the comparison without projection, whose matrix of all pairs of parameters has to fit into memory."""
PACKAGES = {"curvlinops": "curvlinops-for-pytorch"}
"""Names under which libraries are installed, where these are others."""
KNOWN_LAYERS = (nn.Linear, nn.Conv2d)


@dataclass(frozen=True)
class Settings:
    """The model, its training and its images."""

    num_images: int
    num_queries: int
    resolution: int
    model: ModelSettings
    training: TrainingSettings


FULL = Settings(
    30,
    4,
    16,
    ModelSettings(widths=(8, 16), norm_groups=4),
    TrainingSettings(epochs=40, batch_size=10, checkpoints=2, warmup_steps=10),
)
SMOKE = Settings(
    6,
    2,
    8,
    ModelSettings(widths=(8, 8), norm_groups=4),
    TrainingSettings(epochs=4, batch_size=3, checkpoints=2, warmup_steps=2),
)


@dataclass(frozen=True)
class Row:
    """Our scores beside those of one reference."""

    scores: str
    library: str
    how: str
    spearman: float | None = None
    """The smallest of all queries."""
    distance: float | None = None
    factor: float | None = None
    """What our scores are multiplied with to come closest to the reference."""
    seconds: float | None = None
    """Time of the reference."""
    error: str | None = None


class Ours:
    """Our scores, and what is handed over.

    Args:
        settings: The model and its images.
        folder: Where the run goes.
    """

    def __init__(self, settings: Settings, folder: Path):
        self.folder = folder
        images = open_images("demo", DataSettings(resolution=settings.resolution))
        asked = open_images("demo-queries", DataSettings(resolution=settings.resolution))
        self.train = images.select(np.linspace(0, len(images) - 1, settings.num_images).round().astype(int))
        self.queries = asked.select(np.linspace(0, len(asked) - 1, settings.num_queries).round().astype(int))
        train(folder, self.train, settings.model, settings.training, show_progress=False)
        self.subject = Subject(list_checkpoints(folder), self.train, Record.open(folder / "record"), "mse")

    @cached_property
    def models(self) -> list[Any]:
        """The networks at the checkpoints."""
        return [load_model(checkpoint, dtype="float64") for checkpoint in self.subject.checkpoints]

    @property
    def known_layers(self) -> list[str]:
        """Parameters of convolutions and linear layers: what K-FAC libraries know."""
        layers = [(path, m) for path, m in self.models[-1].named_modules() if isinstance(m, KNOWN_LAYERS)]
        return [f"{path}.{name}" for path, layer in layers for name, _ in layer.named_parameters()]

    def scores(self) -> dict[str, ndarray]:
        """Compute all scores: (query, train) by name."""
        whole = [TRACIN, RETRAC, TRACIN_ADAM, RETRAC_ADAM, TRACIN_CP, GAS, GRAD_DOT, GRAD_COS]
        found = self._trace(whole)
        kfac, ekfac = (replace(m, precondition=replace(_kronecker(m), events=CURVATURE_EVENTS)) for m in (KFAC, EKFAC))
        reduced = replace(kfac, name="kfac reduce", precondition=replace(_kronecker(kfac), sharing="reduce"))
        layers = tuple(self.known_layers)
        known = self._trace([GRAD_DOT, kfac, ekfac], parameters=layers, damping=DAMPING)
        found |= {f"{name}, known layers": values for name, values in known.items()}
        but_keys = tuple(name for name in layers if ".to_k." not in name)
        known = self._trace([reduced], parameters=but_keys, damping=DAMPING)
        found |= {f"{name}, known layers but keys": values for name, values in known.items()}
        found |= self._stored([TRAK, RELATIF, RELATIF_L, RENORMALISED], output="loss")
        found |= self._stored([D_TRAK], output="squares")
        found |= self._stored([DAS, DAS_SIGNED], output="mean")
        found |= self._stored([replace(TRAK, name="trak, all checkpoints", checkpoints="all")], checkpoints="all")
        for output, method in (("loss", TRAK), ("squares", D_TRAK)):
            one_layer = self._stored([method], output=output, parameters=BLOCK)
            found[f"{method.name}, one layer"] = one_layer[method.name]
        found["trak, projected"] = self._stored([TRAK], projection="rademacher", width=WIDTH)["trak"]
        return found

    def _trace(self, methods: list[Method], **changes: Any) -> dict[str, ndarray]:
        settings = TraceSettings(
            timesteps=TIMESTEPS,
            draws=DRAWS,
            phases=1,
            train_timesteps=TIMESTEPS,
            train_draws=DRAWS,
            dtype="float64",
            **changes,
        )
        scores = trace(self.subject, self.queries, methods, settings, self.folder, show_progress=False)
        return {name: one.values for name, one in scores.items()}

    def _stored(self, methods: list[Method], **changes: Any) -> dict[str, ndarray]:
        options: dict[str, Any] = {"projection": "identity", "checkpoints": "last"} | changes
        settings = IndexSettings(
            grid=True,
            train_timesteps=TIMESTEPS,
            train_draws=DRAWS,
            dtype="float64",
            rows="float32",
            **options,
        )
        asked = QuerySettings(timesteps=TIMESTEPS, draws=DRAWS, phases=1, damping=DAMPING)
        store = index(self.subject, settings, self.folder, show_progress=False)
        scores: dict[str, Any] = query(
            self.subject, store, self.queries, methods, asked, self.folder, show_progress=False
        )
        return {name: one.values for name, one in scores.items()}

    def hand_over(self, file: Path) -> None:
        """Write weights, events, residuals and the matrix of the projection."""
        grid = Grid(TIMESTEPS, DRAWS)
        tensors = self._events("train", self._grid_batch(self.train, "train", grid), TIMESTEPS * DRAWS)
        tensors |= self._events("query", self._grid_batch(self.queries, "query", grid), TIMESTEPS * DRAWS)
        replays = self.subject.replays
        assert replays is not None
        for k, checkpoint in enumerate(self.subject.checkpoints):
            tensors |= {f"weights.{k}.{name}": value for name, value in self.models[k].state_dict().items()}
            state = load_file(checkpoint.folder / "resume" / "optimizer.safetensors")
            tensors |= {f"adam.{k}.{name}": value.double() for name, value in state.items()}
            after = self.subject.previous_step[checkpoint.step]
            visits = replays.events(after, checkpoint.step, Replay("last"), "learning_rate")
            assert visits.row.tolist() == list(range(len(self.train))), "each image is visited between checkpoints"
            batch = make_batch(visits, self.train, self.subject.process, dtype=torch.float64)
            tensors |= self._events(f"replay.{k}", batch, 1) | {f"replay_weight.{k}": batch.weight}
        tensors |= self._residuals()
        tensors["matrix"] = self._matrix()
        names = [name for name, _ in self.models[-1].named_parameters()]
        about = {
            "config": {k: v for k, v in self.models[-1].config.items() if not k.startswith("_")},
            "damping": DAMPING,
            "query_timesteps": TIMESTEPS,
            "num_checkpoints": len(self.models),
            "block": [name for name in names if name.startswith(BLOCK[0].removesuffix("*"))],
        }
        save_file({name: t.contiguous() for name, t in tensors.items()}, file, {"about": json.dumps(about)})

    def _grid_batch(self, images: ImageData, side: Any, grid: Grid) -> EventBatch:
        process = self.subject.process
        table = grid_events(images, range(len(images)), side, grid, process.num_timesteps, seed=0)
        return make_batch(table, images, process, dtype=torch.float64)

    def _events(self, name: str, batch: EventBatch, events: int) -> dict[str, Tensor]:
        parts = {"noisy": batch.noisy, "timesteps": batch.timesteps, "target": batch.target}
        return {f"{name}.{part}": tensor.unflatten(0, (-1, events)) for part, tensor in parts.items()}

    def _residuals(self) -> dict[str, Tensor]:
        """Give the events of the curvature, with the standard normals of their residuals as targets."""
        num_timesteps = self.subject.process.num_timesteps
        everything = range(len(self.train))
        table = grid_events(self.train, everything, "train", CURVATURE_EVENTS, num_timesteps, seed=0)
        batch = make_batch(table, self.train, self.subject.process, dtype=torch.float64)
        drawn = normals_of_keys(~table.noise_key, tuple(batch.target.shape[1:]))
        parts = {"noisy": batch.noisy, "timesteps": batch.timesteps, "target": torch.from_numpy(drawn).double()}
        return {f"sampled.{name}": tensor for name, tensor in parts.items()}

    def _matrix(self) -> Tensor:
        """Project every unit vector: (parameter, width)."""
        shapes = {name: tuple(p.shape) for name, p in self.models[-1].named_parameters()}
        projection = make_projection("rademacher", shapes, width=WIDTH, seed=0, dtype=torch.float64)
        rows = []
        for name, shape in shapes.items():
            count = int(np.prod(shape))
            for start in range(0, count, 1024):
                some = torch.zeros(min(1024, count - start), count, dtype=torch.float64)
                some[:, start:].fill_diagonal_(1)
                made = torch.zeros(len(some), WIDTH, dtype=torch.float64)
                projection.add(made, name, some.unflatten(1, shape))
                rows.append(made)
        return torch.cat(rows)


def _kronecker(method: Method) -> KroneckerInverse:
    assert isinstance(method.precondition, KroneckerInverse)
    return method.precondition


def compare(scores: dict[str, ndarray], file: Path, library: str) -> list[Row]:
    """Compute the scores of a library in a process of its own."""
    python = sys.executable if library == FORMULA else str(peers.PYTHON)
    with tempfile.TemporaryDirectory() as folder:
        command = [python, str(HERE / "agreement_peers.py"), "work", str(file), library, folder]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=LIMIT_S)
            ended = ""
        except subprocess.CalledProcessError as error:
            ended = (error.stderr.strip().splitlines() or ["no message"])[-1]
        except subprocess.TimeoutExpired:
            ended = f"stopped after {LIMIT_S} s"
        rows = []
        for name, reference in references_of(library).items():
            path = Path(folder) / f"{name}.json"
            facts: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"error": ended}
            if "error" not in facts:
                facts |= measure(scores[name], np.load(path.with_suffix(".npy")))
            rows.append(Row(name, library, reference.how, **facts))
    return rows


def measure(found: ndarray, want: ndarray) -> dict[str, float]:
    """Compare scores, (query, train), with a reference's."""
    factor = float((found * want).sum() / (found * found).sum())
    ranks = [spearman(ours, theirs) for ours, theirs in zip(found, want, strict=True)]
    return {"spearman": min(ranks), "distance": distance(found * factor, want), "factor": factor}


def to_markdown(result: dict[str, Any]) -> str:
    """Write the page."""
    about, lines = result["about"], (__doc__ or "").splitlines()
    text = f"# Agreement with other libraries\n\n    {about['command']}\n\n{lines[0]}\n"
    text += "\n".join(lines[4:]) + "\n\n"
    text += (
        f"The model has {about['num_params']:,} parameters and was trained for {about['steps']} steps on "
        f"{about['num_images']} images of {about['resolution']} x {about['resolution']} pixels; {about['num_queries']} "
        f"queries; grids of {TIMESTEPS} timesteps x {DRAWS} draws; {about['num_checkpoints']} checkpoints. *known "
        "layers*: convolutions and linear layers. *one layer*: a convolution, for methods that invert a matrix of all "
        "pairs of parameters. *factor*: what our scores are multiplied with.\n\n"
    )
    columns = ["scores", "reference", "what of it", "Spearman", "distance", "factor"]
    text += "| " + " | ".join(columns) + " |\n|" + "---|" * len(columns) + "\n"
    for row in result["rows"]:
        cells = [row["scores"], row["library"], row["how"]]
        cells += (
            [row["error"], "", ""] if row["error"] else [_rank(row), f"{row['distance']:.1e}", f"{row['factor']:.6g}"]
        )
        text += "| " + " | ".join(cells) + " |\n"
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    return text + f"\n{about['date']}, {about['device']}, Python {about['python']}; {versions}.\n"


def _rank(row: dict[str, Any]) -> str:
    digits = f"{row['spearman']:.6f}"
    return digits if agrees(row) else f"**{digits}**"


def agrees(row: dict[str, Any]) -> bool:
    """Tell whether a row keeps to the bound."""
    return row["error"] is None and row["spearman"] > BOUND


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a toy: that it works")
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True, help="ask other libraries")
    parser.add_argument("--libraries", nargs="+", choices=LIBRARIES)
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("--markdown", type=Path, help="file for the table")
    args = parser.parse_args()
    libraries = args.libraries or (LIBRARIES if args.peers else [FORMULA])
    if set(libraries) != {FORMULA}:
        peers.install()
    settings = SMOKE if args.smoke else FULL
    with tempfile.TemporaryDirectory() as folder:
        ours = Ours(settings, Path(folder) / "run")
        scores = ours.scores()
        file = Path(folder) / "case.safetensors"
        ours.hand_over(file)
        rows: list[Row] = []
        for library in libraries:
            rows += compare(scores, file, library)
            for row in rows[-len(references_of(library)) :]:
                print(f"{row.scores}, {row.library}: {row.error or row.spearman}", file=sys.stderr)
        about = describe_machine(torch.get_num_threads(), "cpu", [OURS])
        about["versions"] |= peers.versions([PACKAGES.get(name, name) for name in libraries if name != FORMULA])
        about |= {
            "command": "python benchmarks/agreement.py --markdown docs/results/agreement.md",
            "num_params": sum(p.numel() for p in ours.models[-1].parameters()),
            "steps": ours.subject.checkpoints[-1].step,
            "num_checkpoints": len(ours.models),
            **{f.name: v for f in dataclasses.fields(settings) if isinstance(v := getattr(settings, f.name), int)},
        }
    result = {"about": about, "rows": [asdict(row) for row in rows]}
    text = to_markdown(result)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    if args.markdown:
        args.markdown.write_text(text)
    print(text)
    if not all(agrees(row) for row in result["rows"]):
        sys.exit(1)


if __name__ == "__main__":
    main()
