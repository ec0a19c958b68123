"""Events: at which timestep, with which noise, a sample's gradient is taken.

An event table names events by their keys alone; :func:`make_batch` turns some of them into the arrays that a network
sees. Both sides of a score, the replay check, and anyone who wants to check a score by hand get their events here.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Float64, Int, Int64, UInt64
from numpy import ndarray
from torch import Tensor

from whence.data import ImageData
from whence.diffusion.noise import Side, noise_key, normals_of_keys
from whence.diffusion.process import NoiseProcess, even_timesteps
from whence.errors import RecordError, check_choice
from whence.methods.frame import Grid, Replay, ReplayedVisits, Trajectory, WeightsRule
from whence.record import Record, Visits
from whence.recorder import flip_where


@dataclass(frozen=True)
class EventTable:
    """Events by their keys. All columns have one entry per event."""

    row: Int64[ndarray, " event"]
    """Row of the sample in its image data."""
    timestep: Int64[ndarray, " event"]
    """Timestep 0..T-1."""
    noise_key: UInt64[ndarray, " event"]
    """Key of the noise."""
    flip: Bool[ndarray, " event"]
    """Whether the image is mirrored."""
    loss_weight: Float32[ndarray, " event"]
    """Factor inside the loss."""
    weight: Float64[ndarray, " event"]
    """Weight w_e of the event's gradient in the score."""

    def __len__(self) -> int:
        return len(self.row)

    def take(self, which: ndarray | slice) -> "EventTable":
        """Keep some events, by position or mask."""
        return EventTable(**{f.name: getattr(self, f.name)[which] for f in fields(self)})


@dataclass(frozen=True)
class EventBatch:
    """What the network sees at some events, and what it should answer."""

    clean: Float[Tensor, "event channel height width"]
    noise: Float[Tensor, "event channel height width"]
    noisy: Float[Tensor, "event channel height width"]
    """x_t."""
    target: Float[Tensor, "event channel height width"]
    timesteps: Int[Tensor, " event"]
    loss_weight: Float[Tensor, " event"]
    weight: Float[Tensor, " event"]


def make_batch(
    table: EventTable,
    images: ImageData,
    process: NoiseProcess,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> EventBatch:
    """Draw the noise of events and make their noisy images and targets.

    Args:
        table: The events.
        images: The images that ``table.row`` points into.
        process: The noising process.
        dtype: Of all floating-point arrays. The noise itself is always rounded to float32 first.
        device: Where the arrays go.

    Returns:
        Arrays in the order of the table.
    """
    pixels, which = np.unique(table.row, return_inverse=True)
    clean = torch.from_numpy(images.pixels(pixels.tolist())[which])
    clean = flip_where(clean, torch.from_numpy(table.flip)).to(device, dtype)
    noise = torch.from_numpy(normals_of_keys(table.noise_key, tuple(clean.shape[1:]))).to(device, dtype)
    timesteps = torch.from_numpy(table.timestep).to(device)
    return EventBatch(
        clean,
        noise,
        process.add_noise(clean, noise, timesteps),
        process.target(clean, noise, timesteps),
        timesteps,
        torch.from_numpy(table.loss_weight).to(device, dtype),
        torch.from_numpy(table.weight).to(device, torch.float64),
    )


def grid_events(
    images: ImageData,
    rows: Sequence[int],
    side: Side,
    grid: Grid,
    num_timesteps: int,
    seed: int,
    points: range | None = None,
) -> EventTable:
    """List the events of a grid: for each row all timesteps in order, at each timestep all draws.

    The noise depends on (seed, side, id, timestep, draw) alone, so a finer grid keeps the points it shares with a
    coarser one.

    Args:
        images: Where the samples are.
        rows: Which samples.
        side: Whose noise is drawn.
        grid: Timesteps and draws.
        num_timesteps: Timesteps T of the noising process.
        seed: Seed of the noise.
        points: Which of the timesteps, by their number; None: all.

    Returns:
        Events of weight 1, each image as it is (not mirrored).
    """
    timesteps = even_timesteps(1, num_timesteps - 1, grid.timesteps).tolist()
    chosen = timesteps if points is None else timesteps[points.start : points.stop]
    events = [(row, t, draw) for row in rows for t in chosen for draw in range(grid.draws)]
    keys = [noise_key(seed, "grid", side, images.ids[row], t, draw) for row, t, draw in events]
    columns = np.array(events, dtype=np.int64).reshape(-1, 3)
    return _table(columns[:, 0], columns[:, 1], np.array(keys, dtype=np.uint64))


def sample_events(
    images: ImageData,
    rows: Sequence[int],
    side: Side,
    events: Grid | Trajectory,
    num_timesteps: int,
    seed: int,
    points: range,
) -> tuple[ImageData, EventTable]:
    """List the events of a grid or of trajectories: for each row all timesteps in order, at each timestep all draws.

    Args:
        images: Where the samples are, with their trajectories if events are on these.
        rows: Which samples.
        side: Whose noise is drawn.
        events: Timesteps, or steps of a sampler, and draws.
        num_timesteps: Timesteps T of the noising process.
        seed: Seed of the noise.
        points: Which of the timesteps, by their number.

    Returns:
        The images that are noised, and events of weight 1 that point into them. Those of a trajectory are what the
        sampler took the image to be, with noise that depends on (seed, side, id, timestep, draw) alone.
    """
    if isinstance(events, Grid):
        return images, grid_events(images, rows, side, events, num_timesteps, seed, points)
    found = images.trajectories
    assert found is not None  # checked where the queries are
    chosen = found.timesteps[points.start : points.stop]
    names = [images.ids[row] for row in rows]
    frames = found.frames[list(rows), points.start : points.stop]
    noised = ImageData.from_arrays(
        frames.reshape(-1, *frames.shape[2:]), [f"{name} at step {t}" for name in names for t in chosen]
    )
    keys = [
        noise_key(seed, "trajectory", side, name, t, draw)
        for name in names
        for t in chosen
        for draw in range(events.draws)
    ]
    row = np.repeat(np.arange(len(noised)), events.draws)
    timestep = np.tile(np.repeat(np.array(chosen, dtype=np.int64), events.draws), len(rows))
    return noised, _table(row, timestep, np.array(keys, dtype=np.uint64))


class Replays:
    """The visits of a record, matched with the training images they belong to.

    Args:
        record: The record.
        images: The training images.

    Raises:
        RecordError: If the images are not those that were trained on, or visits cannot be replayed.
    """

    def __init__(self, record: Record, images: ImageData):
        check_same_data(record, images)
        row_of = {sample_id: row for row, sample_id in enumerate(images.ids)}
        self.record = record
        self.num_images = len(images)
        if not len(record.visits):
            raise RecordError(f"The record in {record.folder} holds no visits. Restore its parts, or train again.")
        self._row_of_sample = np.array([row_of[i] for i in record.sample_ids], dtype=np.int64)
        cropped = record.visits.crop_top.any() or record.visits.crop_left.any()
        if cropped or record.visits.condition_dropped.any():
            raise RecordError(
                f"The record in {record.folder} has random crops or dropped conditions, which cannot be replayed yet. "
                "Trace on a grid instead, by moving record/ out of the run."
            )

    def events(self, after: int, upto: int, replay: Replay, weights: WeightsRule) -> EventTable:
        """List the visits of the steps after+1..upto that stand for their samples, ordered by row, then step.

        Args:
            after: Step of the previous checkpoint; 0 for none.
            upto: Step of the checkpoint.
            replay: All visits, or the last one of each sample.
            weights: How they are weighted.

        Returns:
            Events; a sample without a visit has none.
        """
        check_choice("weights", weights, WeightsRule)
        check_choice("replay", replay.visits, ReplayedVisits)
        visits = self._between(after, upto)
        table = self.table(visits, self._weights(visits, weights))
        order = np.argsort(table.row, kind="stable")
        table = table.take(order)
        if replay.visits == "all" or not len(table):
            return table
        is_last = np.append(table.row[1:] != table.row[:-1], True)
        # What one visit of many stands for: the whole weight of the interval, but under a rule that gives it itself.
        total = np.bincount(table.row, table.weight, self.num_images) if weights == "learning_rate" else None
        last = table.take(is_last)
        return last if total is None else EventTable(**(vars(last) | {"weight": total[last.row]}))

    def grid_weight(self, after: int, upto: int, weights: WeightsRule) -> float:
        """Give the weight that every sample's grid has at a checkpoint: under learning_rate the mean over samples."""
        if weights == "equal":
            return 1.0
        visits = self._between(after, upto)
        if weights == "published":
            return float(self._weights(visits, weights)[:1].sum())
        return float(visits.weight.sum() / self.num_images)

    def table(self, visits: Visits, weight: Float64[ndarray, " visit"] | None = None) -> EventTable:
        """Turn visits into events, in the same order."""
        return _table(
            self._row_of_sample[visits.sample],
            visits.timestep,
            visits.noise_key,
            visits.flip,
            visits.loss_weight,
            weight,
        )

    def _between(self, after: int, upto: int) -> Visits:
        visits = self.record.visits
        # A skipped step trained nothing, so its visits explain nothing.
        return visits.where((visits.step > after) & (visits.step <= upto) & (visits.clip_coefficient > 0))

    def _weights(self, visits: Visits, rule: WeightsRule) -> Float64[ndarray, " visit"]:
        if rule == "learning_rate":
            return visits.weight
        if rule == "equal" or not len(visits):
            return np.ones(len(visits))
        batch_size = int(visits.samples_in_step.max())
        epochs = len(visits) / self.num_images
        whole_batches = max(self.num_images // batch_size, 1) * batch_size
        return np.full(len(visits), visits.learning_rate[-1] * batch_size * epochs / whole_batches)


def check_same_data(record: Record, images: ImageData) -> None:
    """Refuse images that are not those of the record.

    Raises:
        RecordError: If recorded ids are not among the images, or the fingerprints differ.
    """
    unknown = sorted(set(record.sample_ids) - set(images.ids))
    if unknown:
        raise RecordError(
            f"The record in {record.folder} is of other images: {len(unknown)} of its {len(record.sample_ids)} ids are "
            f"not in {images.source}, for example {', '.join(unknown[:3])}. Give the training images with --data."
        )
    want = record.manifest["data_fingerprint"]
    if want is not None and want != images.fingerprint:
        raise RecordError(
            f"The images in {images.source} are not those that were trained on: their fingerprint is "
            f"{images.fingerprint[:12]}…, the record says {want[:12]}…. An image, the order or the size differs; give "
            "the training images and their size settings as they were."
        )


def _table(
    row: ndarray,
    timestep: ndarray,
    keys: ndarray,
    flip: ndarray | None = None,
    loss_weight: ndarray | None = None,
    weight: ndarray | None = None,
) -> EventTable:
    num_events = len(row)
    return EventTable(
        row,
        timestep,
        keys,
        np.zeros(num_events, dtype=bool) if flip is None else flip,
        np.ones(num_events, dtype=np.float32) if loss_weight is None else loss_weight,
        np.ones(num_events) if weight is None else weight,
    )
