"""Counterfactual removal, planned: which models tell how a query changes without the images that a method ranks first.

Models are trained on all images; on all but the top k of a query by a method; on all but k random ones, others for each
seed; and each of it with several seeds (with ``only``, on nothing but those k). Removal at random shows what fewer
images do, a second seed what chance does. Where a query was sampled from the model by a known seed, every model draws
it again from the same noise. What comes out of it is the business of ``whence.effects``; training, sharing and resuming
are those of ``whence.many_models``.
"""

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import get_args

import numpy as np
from jaxtyping import Bool
from numpy import ndarray

from whence._files import sha256_of_json
from whence._trainers import Recipe
from whence.checkpoints import load_model, load_scheduler
from whence.config import CounterfactualSettings, Way
from whence.data import ImageData, fingerprint_of
from whence.encoders import Encoder, find_encoder
from whence.errors import ConfigError, DataError, ScoresError, check_choice
from whence.event_table import conditions_of
from whence.many_models import ManyModels, Members, Sampling, Unit, plan_models
from whence.measuring import finite_measures, make_grid, measure_model
from whence.methods.baselines import EMBEDDINGS
from whence.sampling import sample_in_parts
from whence.scores import Scores
from whence.subject import Subject
from whence.subsets import draw_members
from whence.training import seconds_per_step

FORMAT_VERSION = 1  # of counterfactual.json
SAME_IMAGE = 0.05
"""A query is an image that the model samples where no pixel is further off, in [-1, 1]: rounding, not another image."""


@dataclass(frozen=True)
class Question:
    """The ranking of one query by one method, cut off at k."""

    method: str
    query: str
    k: int
    way: Way
    top: tuple[str, ...]
    """Ids of the training images, strongest first."""


@dataclass(frozen=True)
class Cost:
    """What is still to be done."""

    models: int
    """In all."""
    finished: int
    steps: int | None
    """Optimizer steps of all that is not finished; None where the trainer is the user's own."""
    seconds_per_step: float | None
    """Measured on a few steps."""
    measuring_s: float
    """Seconds to measure and sample with one model, from a few batches."""
    workers: int

    @property
    def minutes(self) -> float | None:
        """Time of all that is not finished, if workers do not get in each other's way; None where it is not known."""
        if self.steps is None or self.seconds_per_step is None:
            return None
        missing = self.models - self.finished
        return (
            (self.steps * self.seconds_per_step + missing * self.measuring_s) / min(self.workers, max(missing, 1)) / 60
        )


@dataclass(frozen=True)
class Counterfactual:
    """Which models answer which question."""

    work: ManyModels
    settings: CounterfactualSettings
    questions: tuple[Question, ...]
    whole: tuple[Unit, ...]
    """Models of all images, by seed, as all below."""
    random: Mapping[tuple[int, Way], tuple[Unit, ...]]
    top: Mapping[Question, tuple[Unit, ...]]
    encoder: Encoder | None
    notes: tuple[str, ...]

    @property
    def folder(self) -> Path:
        """Where the result goes."""
        identity = {
            "version": FORMAT_VERSION,
            "training": self.work.spec,
            "measuring": self.work.measuring,
            "questions": [asdict(question) for question in self.questions],
            "seeds": self.settings.seeds,
            "random_seed": self.settings.random_seed,
            "measure": self.settings.measure,
            "encoder": self.encoder.identity if self.encoder else None,
        }
        return self.work.folder.parent.parent / "evaluation" / f"counterfactual-{sha256_of_json(identity)[:8]}"

    @property
    def drawn(self) -> tuple[str, ...]:
        """Queries that every model draws again."""
        return self.work.sampling.ids if self.work.sampling else ()

    def cost(self) -> Cost:
        """Time a few steps and batches, and count what is to be done.

        Returns:
            The cost; nothing of what was timed stays.
        """
        missing = self.work.missing()
        steps = per_step = None
        device = self.settings.devices[0]
        if isinstance(trainer := self.work.trainer, Recipe):
            sizes = self.work.subsets.sum(axis=1)
            steps = sum(trainer.num_steps(int(sizes[subset])) for subset, _ in missing)
            per_step = seconds_per_step(self.work.subject.train, trainer.model, trainer.training, device)
        return Cost(
            len(self.work.units),
            len(self.work.units) - len(missing),
            steps,
            per_step,
            self._time_measuring(device),
            self.settings.workers,
        )

    def _time_measuring(self, device: str) -> float:
        """Give the seconds that one model takes to be measured and to sample."""
        work, settings = self.work, self.settings
        checkpoint = work.subject.checkpoints[-1]
        model = load_model(checkpoint, settings.weights_name, allow_pickle=work.subject.allow_pickle, device=device)
        grid = make_grid(work.queries.ids[:1], min(4, settings.timesteps), 2, work.process.num_timesteps, 0)
        one, seconds = work.queries.select([0]), []
        for _ in range(2):  # the first one warms up
            start_s = time.perf_counter()
            measure_model(model, work.process, one, grid, loss=work.subject.loss, batch_size=settings.batch_size)
            seconds.append(time.perf_counter() - start_s)
        per_event = seconds[-1] / (grid.keys.size * 2)
        events = len(work.queries) * settings.timesteps * settings.draws
        sampled = len(self.drawn) * (work.sampling.steps if work.sampling else 0)
        return per_event * (events + sampled)


def plan_counterfactual(
    subject: Subject,
    queries: ImageData,
    scores: Sequence[Scores],
    settings: CounterfactualSettings,
    folder: Path,
) -> Counterfactual:
    """Decide which models are to be trained; the last checkpoint samples generated queries once, to know them again.

    Args:
        subject: Whose training is repeated.
        queries: Images to ask about.
        scores: Of one or more methods, for these queries and perhaps others.
        settings: How many images, seeds, training, measuring, processes.
        folder: The run.

    Returns:
        The plan; :meth:`Counterfactual.cost` tells what it costs, :meth:`Counterfactual.run` follows it.

    Raises:
        ConfigError: If settings cannot be met.
        ScoresError: If scores are of other images, lack a query, or are not finite.
    """
    _check(subject, settings)
    if not scores:
        raise ScoresError("Give the scores of at least one method.")
    for one in scores:
        check_scored(one, subject.train, queries)
    questions = [question for named in _named(scores) for question in _questions(*named, queries, settings)]
    encoder = None
    if settings.encoder is not None:
        method = replace(EMBEDDINGS, encoder=settings.encoder)
        encoder = find_encoder(method, subject.train, device=settings.devices[0], allow_pickle=subject.allow_pickle)
    sampling, notes = _recognise(subject, queries, settings)
    sets = _Sets(subject.train.ids)
    size = len(subject.train)
    whole = sets.units([np.ones(size, dtype=bool)] * len(settings.seeds), settings.seeds)
    random: dict[tuple[int, Way], tuple[Unit, ...]] = {}
    for k, way in itertools.product(settings.top, settings.ways):
        drawn = [draw_members(subject.train.ids, k, settings.random_seed, seed) for seed in settings.seeds]
        random[k, way] = sets.units([_taken(chosen, way) for chosen in drawn], settings.seeds)
    shared = frozenset(row for row, _ in sets.asked)
    top = {}
    for question in questions:
        chosen = np.zeros(size, dtype=bool)
        chosen[subject.train.rows(question.top)] = True
        top[question] = sets.units([_taken(chosen, question.way)] * len(settings.seeds), settings.seeds)
    members = sets.members(f"{len(sets.asked)} models, each trained from scratch.", shared)
    # An own trainer decides on its length itself, and so does who gives the epochs.
    as_long = settings.same_steps and settings.trainer is None and settings.epochs is None
    again = replace(settings, same_steps=as_long)
    work = plan_models(subject, {"queries": queries}, again, folder, members, sampling)
    if settings.measure not in finite_measures(work.process):
        raise ConfigError(
            f"Unknown measure {settings.measure!r}; known are {', '.join(finite_measures(work.process))}."
        )
    notes += _notes_on(questions, scores, subject, queries, work)
    return Counterfactual(work, settings, tuple(questions), whole, random, top, encoder, tuple(notes))


class _Sets:
    """Collects training sets; the same one is trained once for each seed, whoever asks for it."""

    def __init__(self, ids: tuple[str, ...]) -> None:
        self.ids = np.array(ids, dtype=object)
        self.masks: dict[bytes, ndarray] = {}
        self.asked: dict[Unit, None] = {}

    def units(self, masks: Sequence[Bool[ndarray, " train"]], seeds: Sequence[int]) -> tuple[Unit, ...]:
        """Note one set for each seed."""
        units = []
        for mask, seed in zip(masks, seeds, strict=True):
            self.masks.setdefault(mask.tobytes(), mask)
            units.append((list(self.masks).index(mask.tobytes()), seed))
        self.asked |= dict.fromkeys(units)
        return tuple(units)

    def members(self, note: str, shared: frozenset[int]) -> Members:
        """Give all sets, called by their members' ids."""
        masks = np.stack(list(self.masks.values()))
        names = tuple(f"ids-{sha256_of_json(sorted(self.ids[mask]))[:16]}" for mask in masks)
        return Members(masks, names, tuple(self.asked), "by their members", note, shared)


def _taken(chosen: Bool[ndarray, " train"], way: Way) -> Bool[ndarray, " train"]:
    return chosen if way == "only" else ~chosen


def _check(subject: Subject, settings: CounterfactualSettings) -> None:
    size = len(subject.train)
    faults = []
    if not settings.top or len(set(settings.top)) < len(settings.top) or not all(0 < k < size for k in settings.top):
        found = " ".join(map(str, settings.top)) or "none"
        faults.append(f"top must be one or more different numbers from 1 to {size - 1}, found {found}")
    if len(set(settings.seeds)) < 2:
        faults.append(f"seeds must be at least two, as their difference is the noise floor; found {settings.seeds}")
    if not settings.ways or len(set(settings.ways)) < len(settings.ways):
        faults.append(f"ways must be one or more of {', '.join(get_args(Way))}, each once; found {settings.ways}")
    if settings.sample_steps < 1:
        faults.append(f"sample_steps must be above 0, found {settings.sample_steps}")
    if faults:
        raise ConfigError("; ".join(faults) + ".")
    for way in settings.ways:
        check_choice("way", way, Way)


def check_scored(scores: Scores, train: ImageData, queries: ImageData) -> None:
    """Refuse scores that are of other training images, lack a query, or cannot be ranked.

    Args:
        scores: Scores of one method.
        train: The training images.
        queries: Images that are asked about, some or all of those scored.

    Raises:
        ScoresError: The message names what differs.
    """
    made_of = scores.details.get("train", {}).get("fingerprint")
    if scores.train_ids != train.ids or (made_of is not None and made_of != train.fingerprint):
        raise ScoresError(
            f"The {scores.method} scores are of other training images than {train.source}. Trace again with these."
        )
    lacking = [id_ for id_ in queries.ids if id_ not in scores.query_ids]
    if lacking:
        raise ScoresError(
            f"The {scores.method} scores lack {len(lacking)} of {len(queries)} queries, such as {lacking[0]}; they "
            f"have {', '.join(scores.query_ids[:3])}{', …' if len(scores.query_ids) > 3 else ''}. Trace these queries."
        )
    asked_about = scores.details.get("queries", {}).get("fingerprint")
    hash_of = dict(zip(queries.ids, queries.seen_hashes, strict=True))
    if asked_about is not None and set(scores.query_ids) == set(hash_of):
        if fingerprint_of(scores.query_ids, [hash_of[id_] for id_ in scores.query_ids]) != asked_about:
            raise ScoresError(
                f"The {scores.method} scores are of other queries under the same ids. Trace these queries."
            )
    rows = [scores.query_ids.index(id_) for id_ in queries.ids]
    if not np.isfinite(scores.values[rows]).all():
        raise ScoresError(f"The {scores.method} scores are not all finite, so they cannot be ranked. Trace again.")


def _named(scores: Sequence[Scores]) -> list[tuple[str, Scores]]:
    """Call scores by their folder where two are of one method."""
    methods = [one.method for one in scores]
    named = [(s.folder.name if methods.count(s.method) > 1 and s.folder else s.method, s) for s in scores]
    if len({name for name, _ in named}) < len(named):
        raise ScoresError("Give scores of different methods, or from different folders.")
    return named


def _questions(name: str, scores: Scores, queries: ImageData, settings: CounterfactualSettings) -> list[Question]:
    return [
        Question(name, id_, k, way, tuple(entry.train_id for entry in scores.top(scores.query_ids.index(id_), k)))
        for id_ in queries.ids
        for k in settings.top
        for way in settings.ways
    ]


def _recognise(
    subject: Subject, queries: ImageData, settings: CounterfactualSettings
) -> tuple[Sampling | None, list[str]]:
    """Find the queries that the model samples from the noise of their id, by sampling them again."""
    if queries.encoding is not None and queries.encoding.latents is not None:
        return None, ["The model samples latents, and a VAE makes images of them; losses are compared only."]
    checkpoint = subject.checkpoints[-1]
    model = load_model(checkpoint, allow_pickle=subject.allow_pickle, device=settings.devices[0])
    if model.config.sample_size is None:
        return None, [
            "The model has no sample_size, so that it is not known what it samples; losses are compared only."
        ]
    sampling = Sampling(queries.ids, settings.sample_steps, settings.sample_seed)
    drawn = sample_in_parts(
        model,
        load_scheduler(checkpoint),
        queries.ids,
        steps=sampling.steps,
        seed=sampling.seed,
        batch_size=settings.batch_size,
        conditions=conditions_of(queries, range(len(queries)), device=model.device),
    )
    if drawn.shape[1:] != (queries.channels, queries.height, queries.width):
        raise DataError(f"The model samples images of {drawn.shape[1:]}, the queries are of another size.")
    off = np.abs(drawn - queries.pixels(range(len(queries)))).reshape(len(queries), -1).max(axis=1)
    known = tuple(id_ for id_, far in zip(queries.ids, off, strict=True) if far <= SAME_IMAGE)
    unknown = len(queries) - len(known)
    notes = []
    if unknown:
        notes.append(
            f"{unknown} of {len(queries)} queries are not what the model samples from seed {settings.sample_seed} in "
            f"{settings.sample_steps} steps (--sample-seed, --sample-steps): their loss is compared, not an image."
        )
    return (replace(sampling, ids=known) if known else None), notes


def _notes_on(
    questions: Sequence[Question], scores: Sequence[Scores], subject: Subject, queries: ImageData, work: ManyModels
) -> list[str]:
    notes = []
    for name, one in _named(scores):
        for id_ in queries.ids:
            positive = int((one.values[one.query_ids.index(id_)] > 0).sum())
            short = [q.k for q in questions if (q.method, q.query) == (name, id_) and q.k > positive]
            if short:
                notes.append(f"{name}, {id_}: only {positive} images have a positive score, fewer than {max(short)}.")
    trained = dict(zip(subject.train.hashes, subject.train.ids, strict=True))
    for id_, hash_ in zip(queries.ids, queries.hashes, strict=True):
        if hash_ in trained:
            notes.append(f"The query {id_} is itself a training image, {trained[hash_]}.")
    if isinstance(work.trainer, Recipe):
        how = "about as many optimizer steps" if work.trainer.same_steps_as else "as many epochs"
        notes.append(f"All models took {how}, by the run's own settings.")
    else:
        notes.append("Models were made by a trainer of the user's own.")
    return notes
