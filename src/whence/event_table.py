"""Events: at which timestep, with which noise, a sample's gradient is taken.

An event table names events by their keys alone; :func:`make_batch` turns some of them into the arrays that a network
sees. Both sides of a score, the replay check, and anyone who wants to check a score by hand get their events here.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Float64, Int, Int64, UInt64
from numpy import ndarray
from torch import Tensor

from whence.data import ImageData, fingerprint_of
from whence.diffusion.noise import Side, draw_latents, noise_key
from whence.diffusion.process import NoiseProcess, even_timesteps
from whence.errors import DataError, RecordError, check_choice
from whence.methods.frame import AntitheticGrid, Grid, Replay, ReplayedVisits, Trajectory, WeightsRule
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
    dropped: Bool[ndarray, " event"]
    """Whether its caption or label is withheld."""
    drawn: Bool[ndarray, " event"]
    """Whether its latents are drawn from the VAE's posterior, by the key; otherwise they are the posterior's mean."""
    loss_weight: Float32[ndarray, " event"] | None
    """Recorded factor inside the loss; None: what the training's objective gives its timestep."""
    weight: Float64[ndarray, " event"]
    """Weight w_e of the event's gradient in the score."""
    negated: Bool[ndarray, " event"]
    """Whether the noise is minus that of the key."""

    def __len__(self) -> int:
        return len(self.row)

    def take(self, which: ndarray | slice) -> "EventTable":
        """Keep some events, by position or mask."""
        weights = None if self.loss_weight is None else self.loss_weight[which]
        columns = {f.name: getattr(self, f.name)[which] for f in fields(self) if f.name != "loss_weight"}
        return EventTable(**columns, loss_weight=weights)


@dataclass(frozen=True)
class EventBatch:
    """What the network sees at some events, and what it should answer."""

    clean: Float[Tensor, "event channel height width"]
    noise: Float[Tensor, "event channel height width"]
    noisy: Float[Tensor, "event channel height width"]
    """x_t."""
    target: Float[Tensor, "event channel height width"]
    timesteps: Int[Tensor, " event"]
    times: Tensor
    """What the network is told of the timesteps."""
    conditions: dict[str, Tensor]
    """What it is told besides, by the names of its arguments."""
    loss_weight: Float[Tensor, " event"]
    weight: Float[Tensor, " event"]
    region: Float[Tensor, "event height width"] | None = None
    """Which places count; None: all alike."""

    def arrays(self) -> dict[str, Tensor]:
        """Give all arrays by name, those of the conditions among them."""
        arrays = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return arrays | self.conditions

    def take(self, some: slice) -> "EventBatch":
        """Keep some events."""
        kept = {name: value[some] for name, value in vars(self).items() if isinstance(value, Tensor)}
        return EventBatch(**kept, conditions={name: value[some] for name, value in self.conditions.items()})


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
    noise, seen = process.noise(table.noise_key, images.input_shape)
    if table.negated.any():
        sign = np.where(table.negated, np.float32(-1), np.float32(1)).reshape(-1, *[1] * len(images.input_shape))
        noise, seen = sign * noise, sign * seen
    clean = _clean(table, images).to(device, dtype)
    timesteps = torch.from_numpy(table.timestep).to(device)
    noise, seen = (torch.from_numpy(n).to(device, dtype) for n in (noise, seen))
    return EventBatch(
        clean=clean,
        noise=noise,
        noisy=process.add_noise(clean, seen, timesteps),
        target=process.target(clean, noise, timesteps),
        timesteps=timesteps,
        times=process.times(timesteps),
        conditions=conditions_of(images, table.row, table.dropped, dtype=dtype, device=device),
        loss_weight=_loss_weight(table, process).to(device, dtype),
        weight=torch.from_numpy(table.weight).to(device, torch.float64),
        region=region_of(images, table.row, dtype=dtype, device=device),
    )


def _loss_weight(table: EventTable, process: NoiseProcess) -> Float[Tensor, " event"]:
    if table.loss_weight is not None:
        return torch.from_numpy(table.loss_weight)
    return process.loss_weight[torch.from_numpy(table.timestep)]


def _clean(table: EventTable, images: ImageData) -> Float[Tensor, "event channel height width"]:
    """Give what is noised at each event: pixels or latents, mirrored where the event says so."""
    if images.encoding is None or images.encoding.latents is None:
        rows, which = np.unique(table.row, return_inverse=True)
        return flip_where(torch.from_numpy(images.pixels(rows)[which]), torch.from_numpy(table.flip))
    mean, deviation = images.encoding.clean(table.row, table.flip)
    if table.drawn.any():
        if deviation is None:
            raise DataError(
                "Training drew latents from the VAE's posterior; its standard deviation is missing. Delete the run's "
                "cache/ folder, so that images are encoded again."
            )
        drawn = draw_latents(mean, deviation, table.noise_key)
        mean = np.where(table.drawn[:, None, None, None], drawn, mean)
    return torch.from_numpy(mean)


def region_of(
    images: ImageData,
    rows: Sequence[int] | Int64[ndarray, " event"],
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> Float[Tensor, "event height width"] | None:
    """Give which part of what is noised counts, as a tensor; None: all of it."""
    region = images.region(rows)
    return None if region is None else torch.from_numpy(region).to(device, dtype)


def conditions_of(
    images: ImageData,
    rows: Sequence[int] | Int64[ndarray, " event"],
    dropped: Bool[ndarray, " event"] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> dict[str, Tensor]:
    """Give what a conditional network is told of images, as tensors; floats in ``dtype``."""
    tensors = {name: torch.from_numpy(values) for name, values in images.conditions(rows, dropped).items()}
    return {n: t.to(device, dtype) if t.is_floating_point() else t.to(device) for n, t in tensors.items()}


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
    coarser one. Of an antithetic grid, draws 0 and 1 are draw 0 and minus that, draws 2 and 3 are draw 1, and so on.

    Args:
        images: Where the samples are.
        rows: Which samples.
        side: Whose noise is drawn.
        grid: Timesteps and draws, and whether these come in pairs of opposite noise.
        num_timesteps: Timesteps T of the noising process.
        seed: Seed of the noise.
        points: Which of the timesteps, by their number; None: all.

    Returns:
        Events of weight 1, each image as it is (not mirrored).
    """
    timesteps = even_timesteps(1, num_timesteps - 1, grid.timesteps).tolist()
    chosen = timesteps if points is None else timesteps[points.start : points.stop]
    events = [(row, t, draw) for row in rows for t in chosen for draw in range(grid.draws)]
    per_key = 2 if isinstance(grid, AntitheticGrid) else 1
    keys = [noise_key(seed, "grid", side, images.ids[row], t, draw // per_key) for row, t, draw in events]
    columns = np.array(events, dtype=np.int64).reshape(-1, 3)
    negated = columns[:, 2] % per_key == 1
    return _table(columns[:, 0], columns[:, 1], np.array(keys, dtype=np.uint64), negated=negated)


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
    noised = _noised(images, rows, frames, [f"{name} at step {t}" for name in names for t in chosen])
    keys = [
        noise_key(seed, "trajectory", side, name, t, draw)
        for name in names
        for t in chosen
        for draw in range(events.draws)
    ]
    row = np.repeat(np.arange(len(noised)), events.draws)
    timestep = np.tile(np.repeat(np.array(chosen, dtype=np.int64), events.draws), len(rows))
    return noised, _table(row, timestep, np.array(keys, dtype=np.uint64))


def _noised(
    images: ImageData, rows: Sequence[int], frames: Float32[ndarray, "row step channel height width"], ids: list[str]
) -> ImageData:
    """Make a data set of a sampler's frames, each with the condition of its image."""
    flat, of_image = frames.reshape(-1, *frames.shape[2:]), np.repeat(np.asarray(rows), frames.shape[1])
    masks = None if images.masks is None else images.masks[of_image]
    if images.encoding is None:
        return replace(ImageData.from_arrays(flat, ids), masks=masks)
    if images.encoding.latents is None:
        return replace(ImageData.from_arrays(flat, ids), encoding=images.encoding.select(of_image), masks=masks)
    # Pixels of a frame are not known; those of its image stand in, and are not looked at.
    pixels = images.pixels(of_image)
    encoding = images.encoding.with_latents(flat, of_image)
    return replace(ImageData.from_arrays(pixels, ids), encoding=encoding, masks=masks)


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
        self._drawn = record.manifest.get("latents") == "sample"
        if record.visits.crop_top.any() or record.visits.crop_left.any():
            raise RecordError(
                f"The record in {record.folder} has random crops, which cannot be replayed yet. Trace on a grid "
                "instead, by moving record/ out of the run."
            )
        conditions = images.encoding and images.encoding.conditions
        if record.visits.condition_dropped.any() and (conditions is None or conditions.withheld is None):
            raise RecordError(
                f"The record in {record.folder} says that conditions were withheld in training, and {images.source} "
                "has no captions or labels that a network is told. Give them with the training images."
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
            flip=visits.flip,
            dropped=visits.condition_dropped,
            drawn=np.full(len(visits), self._drawn),
            loss_weight=visits.loss_weight,
            weight=weight,
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
    # A script knows the fingerprint of what it opened, before anything was encoded.
    if want is not None and want not in (images.fingerprint, fingerprint_of(images.ids, images.hashes)):
        raise RecordError(
            f"The images in {images.source} are not those that were trained on: their fingerprint is "
            f"{images.fingerprint[:12]}…, the record says {want[:12]}…. An image, the order or the size differs; give "
            "the training images and their size settings as they were."
        )


def _table(
    row: ndarray,
    timestep: ndarray,
    keys: ndarray,
    *,
    flip: ndarray | None = None,
    dropped: ndarray | None = None,
    drawn: ndarray | None = None,
    loss_weight: ndarray | None = None,
    weight: ndarray | None = None,
    negated: ndarray | None = None,
) -> EventTable:
    no = np.zeros(len(row), dtype=bool)
    return EventTable(
        row,
        timestep,
        keys,
        no if flip is None else flip,
        no if dropped is None else dropped,
        no if drawn is None else drawn,
        loss_weight,
        np.ones(len(row)) if weight is None else weight,
        no if negated is None else negated,
    )
