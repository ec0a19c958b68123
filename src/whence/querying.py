"""Querying: scores from a store of training gradients, as often as one likes.

At each checkpoint the queries' gradients are taken, projected as the store's rows are and kept, so that asking again
costs nothing (:mod:`whence.query_vectors`). Sums over timesteps, by phase and half as in the streaming way, are then
multiplied with the store's rows, block by block. The result is :class:`whence.scores.Scores` just as streaming gives
it, or for very many training images the top of it only.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64
from numpy import ndarray
from torch import Tensor

from whence._files import sha256_of_json
from whence._store_checks import check_same_content, name_ids
from whence.assembly import make_scores, split_products
from whence.attribution import TraceWork, load_own_scores, notes_on, notes_on_solutions, prepare
from whence.config import QuerySettings
from whence.data import ImageData
from whence.errors import ConfigError, StoreError
from whence.indexing import content_hashes
from whence.methods.frame import Baseline, Method, RidgeInverse
from whence.preconditioning import Preconditioner, factors_after, prepare_preconditioner
from whence.query_vectors import QueryVectors, make_query_side
from whence.row_products import Multiplier, Reading, group_shards, sum_by_sample, top_of_store
from whence.scores import Scores, TopEntry, TopScores
from whence.shards import Shard
from whence.store import Store
from whence.store_spec import check_is_of, check_serves, trace_settings
from whence.streaming import rms_by_image
from whence.subject import Subject
from whence.workload import Workload

VECTOR_BYTES = 4 * 2**30
"""Projected sums of queries that are held at once; beyond it, queries take turns, each a pass over the store."""

_LOOKED_AT = 256
"""Training images whose content is compared with that in the store."""


def query(
    subject: Subject,
    store: Store,
    queries: ImageData,
    methods: Sequence[Method | Baseline],
    settings: QuerySettings,
    folder: Path,
    *,
    top: int | None = None,
    show_progress: bool = True,
) -> dict[str, Scores | TopScores]:
    """Score the images of a store for every query by each method; what is on disk already is not computed again.

    Args:
        subject: The checkpoints, images and record that the store was made of.
        store: A finished store.
        queries: Images of the size that the model was trained on.
        methods: Declarations; their query grids are taken from the settings, all else must be as in the store.
        settings: The query grid, batch size, device.
        folder: The run; ``scores/<method>-stored-<hash>`` and ``cache/queries`` are made in it.
        top: Keep only so many images of each query: memory and disk then do not grow with the training set.
        show_progress: Show a progress bar.

    Returns:
        Scores by method name, in the order asked for.

    Raises:
        ConfigError: If settings contradict each other, or a method needs no store.
        StoreError: If the store is of another model, is not finished or damaged, or does not hold what a method needs.
        NumericsError: If a gradient is not finite.
    """
    if top is not None and top < 1:
        raise ConfigError(f"top must be above 0, found {top}: it is how many training images to keep of each query.")
    check_is_of(store, subject)
    work = prepare(subject, queries, methods, trace_settings(store.spec, settings), folder)
    if work.baselines:
        names = ", ".join(baseline.name for baseline in work.baselines)
        raise ConfigError(f"{names} needs no gradients and so no store. Use `whence trace`.")
    for load in work.loads:
        for method in load.methods:
            check_serves(store, method, subject)
    specs, folders = places_of_scores(work, store, folder, top)
    finished = "manifest.json" if top is None else "top.json"
    wanted = [name for name, path in folders.items() if not (path / finished).exists()]
    if wanted:
        store.check()
    for load in work.loads:
        here = [method for method in load.methods if method.name in wanted]
        if here:
            stored = _StoredPass(replace(load, methods=here), store, folder / "cache", show_progress)
            for scores in stored.scores() if top is None else stored.top(top):
                name = scores.method
                notes = work.notes[name] + _notes_on_rows(store, load, name)
                if isinstance(scores, Scores):
                    notes += notes_on(scores, subject, load.settings)
                notes += _notes_on_damping(scores.details) + notes_on_solutions(scores.details)
                replace(scores, details=scores.details | specs[name] | {"notes": notes}).save(folders[name])
    if top is not None:
        return {name: TopScores.load(path) for name, path in folders.items()}
    return {name: load_own_scores(path, specs[name]) for name, path in folders.items()}


def places_of_scores(
    work: TraceWork, store: Store, folder: Path, top: int | None = None
) -> tuple[dict[str, dict[str, Any]], dict[str, Path]]:
    """Say what the scores of each method depend on, and where they lie.

    Returns:
        Both by the method's name.
    """
    about_store = {"store": store.spec_sha256} | ({} if top is None else {"top": top})
    specs = {name: spec | about_store for name, spec in work.specs.items()}
    kind = "stored" if top is None else f"top{top}"
    return specs, {name: folder / "scores" / f"{name}-{kind}-{sha256_of_json(s)[:8]}" for name, s in specs.items()}


def _notes_on_rows(store: Store, load: Workload, name: str) -> list[str]:
    kind, plan = store.spec["space"]["projection"]["kind"], store.spec["provenance"]["plan"]
    notes = [] if kind == "identity" else [f"Scores are of gradients projected to {store.width} numbers ({kind})."]
    (method,) = (method for method in load.methods if method.name == name)
    if notes and load.precondition is not None:
        notes.append(
            "The preconditioner is applied before the projection, whose error goes by the length of what it gives and "
            "can exceed the scores of an inverse curvature. Compare with `whence trace` for a few queries."
        )
    if method.train.unit == "sample" and kind != "identity":
        notes.append("Lengths of the summed gradients are those of the projected sums.")
    elif plan["norms"] == "projected" and plan["keep"] == "units":
        notes.append("Lengths of training gradients are those of the projected ones.")
    return notes


def _notes_on_damping(details: Mapping[str, Any]) -> list[str]:
    edges = [
        f"{found['damping']:g} at step {step}"
        for step, found in details.get("preconditioners", {}).items()
        if "tried" in found and found["damping"] in (found["tried"][0], found["tried"][-1])
    ]
    if not edges:
        return []
    return [
        f"The damping chosen by cross-validation is the first or the last that was tried ({', '.join(edges)} mean "
        "eigenvalues): it says little. Give --damping."
    ]


_Shared = tuple[Reading, RidgeInverse] | None
"""What methods have in common whose query vectors are the same."""


class _StoredPass:
    """Queries at each checkpoint, then one pass over the store."""

    def __init__(self, work: Workload, store: Store, cache: Path, show_progress: bool):
        self.work, self.store, self.cache, self.show_progress = work, store, cache, show_progress
        self.queries = make_query_side(work, store, cache)
        self.steps = [c.step for c in work.checkpoints]
        timesteps = tuple(work.query_timesteps.tolist()) if work.is_matched else ()
        self.readings = {method: replace(_reading(store, method), meet_at=timesteps) for method in work.methods}
        self._preconditioners: dict[tuple[Method, int], Preconditioner] = {}

    def scores(self) -> list[Scores]:
        """Compute all scores of all methods."""
        self._check_contents()
        self.queries.fill(self.show_progress)
        results = {method: _Result(self.work) for method in self.work.methods}
        groups = group_shards(self.store, self.steps)
        self._check_ids(groups)
        for rows in self._turns():
            vectors = {step: self.queries.read(step, rows) for step in self.steps}
            multipliers = {step: self._multipliers(step, v.vectors.flatten(1, 2)) for step, v in vectors.items()}
            for shard in (shard for group in groups for shard in group):
                self._add_shard(shard, rows, vectors[shard.step], multipliers[shard.step], results)
        return [replace(r.finish(m), details=self._describe(m)) for m, r in results.items()]

    def top(self, k: int) -> list[TopScores]:
        """Compute the largest scores of all methods, one after the other."""
        self._check_contents()
        self.queries.fill(self.show_progress)
        self._check_ids(group_shards(self.store, self.steps))
        return [self._top_of_method(method, k) for method in self.work.methods]

    def _top_of_method(self, method: Method, k: int) -> TopScores:
        entries: list[tuple[TopEntry, ...]] = []
        for rows in self._turns():
            whole = {
                step: self._precondition(method, step, self._whole_vectors(self.queries.read(step, rows), method))
                for step in self.steps
            }
            after = None if method.after == "none" else partial(self._factors_after, method)
            table = top_of_store(self.store, whole, self.readings[method], k, after=after, squared=method.squared)
            for ids, values in zip(table.ids, table.values.tolist(), strict=True):
                train_rows = self.work.subject.train.rows(ids)
                ranked = enumerate(zip(ids, train_rows, values, strict=True), start=1)
                entries.append(tuple(TopEntry(rank, *rest) for rank, rest in ranked))
        return TopScores(method.name, self.work.queries.ids, tuple(entries), details=self._describe(method))

    def _turns(self) -> list[range]:
        width = self.store.width * len(self.steps) * len(self.work.meetings)
        return self.work.split_queries(width, VECTOR_BYTES)

    def _whole_vectors(self, made: QueryVectors, method: Method) -> Float[Tensor, "meeting query width"]:
        """Sum a method's family over all phases: the products of the identity with the vectors, read off as scores."""
        whole = []
        for vectors in made.vectors:
            products = vectors.permute(2, 0, 1).double().numpy()  # width in the place of training images
            by_phase, _ = split_products(self.work, method, products, made.lengths)
            whole.append(torch.from_numpy(by_phase.sum(1)))
        return torch.stack(whole).to(made.vectors)

    def _add_shard(
        self,
        shard: Shard,
        rows: range,
        made: QueryVectors,
        multipliers: Mapping[_Shared, Multiplier],
        results: dict[Method, "_Result"],
    ) -> None:
        arrays, columns = shard.read_all(), self.work.subject.train.rows(shard.ids)
        sample, number = arrays["sample"], self.steps.index(shard.step)
        products: dict[tuple[_Shared, str, int], Float[Tensor, "row vector"]] = {}
        for method, reading in self.readings.items():
            factors, after = reading.factors(arrays), self._factors_after(method, shard, arrays)[:, None]
            for k, met in enumerate(reading.meetings(arrays)):
                key = self._shared(method), reading.rows, k
                if key not in products:
                    products[key] = multipliers[key[0]].multiply(arrays[reading.rows][met], k)
                sums = sum_by_sample(products[key], sample[met], factors[met], len(shard.ids)) * after
                sums = sums.reshape(len(shard.ids), len(rows), -1)
                split = split_products(self.work, method, sums, made.lengths)
                results[method].add(rows, columns, self.work.phases_of(self.work.meetings[k]), *split)
            results[method].add_facts(number, columns, arrays, reading)
            results[method].facts[number]["query_norms"][rows.start : rows.stop] = made.norms

    def _shared(self, method: Method) -> _Shared:
        plan = method.precondition
        return (self.readings[method], plan) if isinstance(plan, RidgeInverse) else None

    def _multipliers(self, step: int, vectors: Float[Tensor, "meeting vector width"]) -> dict[_Shared, Multiplier]:
        """Make one multiplier for all methods of one preconditioner."""
        methods = {self._shared(method): method for method in self.work.methods}
        return {key: Multiplier(self._precondition(method, step, vectors)) for key, method in methods.items()}

    def _precondition(
        self, method: Method, step: int, vectors: Float[Tensor, "meeting vector width"]
    ) -> Float[Tensor, "meeting vector width"]:
        found = self._preconditioner(method, step)
        if found is None:
            return vectors
        return found.ridge.solve(vectors.flatten(0, 1), found.damping).view_as(vectors)

    def _preconditioner(self, method: Method, step: int) -> Preconditioner | None:
        if not isinstance(method.precondition, RidgeInverse):
            return None
        if (method, step) not in self._preconditioners:
            self._preconditioners[method, step] = prepare_preconditioner(
                self.store.shards(step), self.readings[method], method, self.cache / "ridges"
            )
        return self._preconditioners[method, step]

    def _factors_after(
        self, method: Method, shard: Shard, arrays: Mapping[str, ndarray]
    ) -> Float64[ndarray, " sample"]:
        found = self._preconditioner(method, shard.step)
        return factors_after(method, found, self.readings[method], arrays, len(shard.ids))

    def _describe(self, method: Method) -> dict[str, Any]:
        if not isinstance(method.precondition, RidgeInverse):
            return self.queries.describe()
        found = {step: self._preconditioner(method, step) for step in self.steps}
        ridges = {str(step): one.describe() for step, one in found.items() if one is not None}
        return {"preconditioners": ridges}

    def _check_contents(self) -> None:
        """Refuse a store of other images under the same ids, by some of them.

        Another encoder or other captions change many at once, so that not all need to be decoded.
        """
        train = self.work.subject.train
        few = train.select(np.linspace(0, len(train) - 1, min(len(train), _LOOKED_AT)).astype(np.int64))
        contents = dict(zip(few.ids, content_hashes(few), strict=True))
        check_same_content([shard for step in self.steps for shard in self.store.shards(step)], contents)

    def _check_ids(self, groups: list[list[Shard]]) -> None:
        """Refuse a store of more or fewer images than there are."""
        held = {id_ for group in groups for shard in group for id_ in shard.ids}
        lacking = [id_ for id_ in self.work.subject.train.ids if id_ not in held]
        beyond = sorted(held - set(self.work.subject.train.ids))
        if lacking:
            raise StoreError(
                f"{self.store.folder} lacks {len(lacking)} of the training images: {name_ids(lacking)}. Run `whence "
                "index` again, which computes only those."
            )
        if beyond:
            raise StoreError(
                f"{self.store.folder} holds {len(beyond)} images that are not among the training images: "
                f"{name_ids(beyond)}. Give all images with --data."
            )


class _Result:
    """The scores of one method, while the store is read."""

    def __init__(self, work: Workload):
        self.work = work
        num_query, num_train = len(work.queries), len(work.subject.train)
        self.totals = {"phases": np.zeros((num_query, work.phases, num_train))}
        if work.halves:
            self.totals["halves"] = np.zeros((2, num_query, num_train))
        self.facts: list[dict[str, ndarray]] = [
            {
                "query_norms": np.zeros((num_query, work.query_grid.timesteps)),
                "train_norms": np.full(num_train, np.nan),
                "train_weights": np.zeros(num_train),
            }
            for _ in work.checkpoints
        ]

    def add(self, rows: range, columns: list[int], where: slice, phases: ndarray, halves: ndarray | None) -> None:
        """Add the contribution of a shard to some queries, in some phases."""
        self.totals["phases"][rows.start : rows.stop, where, columns] += phases
        if halves is not None:
            self.totals["halves"][:, rows.start : rows.stop, columns] += halves

    def add_facts(self, number: int, columns: list[int], arrays: dict[str, ndarray], reading: Reading) -> None:
        """Note lengths, weights and timesteps of a shard's images at a checkpoint."""
        facts, sample, num_images = self.facts[number], arrays["sample"], len(columns)
        lengths = arrays.get("norm_rms", arrays["norms"]).astype(np.float64)
        facts["train_norms"][columns] = rms_by_image(sample, lengths, num_images)
        assert reading.weights is not None  # every method has weights
        facts["train_weights"][columns] = np.bincount(sample, arrays[reading.weights], num_images)
        if not hasattr(self.work.train_events, "timesteps"):
            known = facts.setdefault("train_timesteps", np.full(len(facts["train_norms"]), -1, dtype=np.int64))
            last = np.full(num_images, -1, dtype=np.int64)
            last[sample] = arrays["timestep"]  # visits are in order of step, so the last one stays
            known[columns] = last

    def finish(self, method: Method) -> Scores:
        """Give the scores."""
        return make_scores(self.work, method, self.totals, self.facts)


def _reading(store: Store, method: Method) -> Reading:
    """Say which rows of a store stand for a method's normalised gradients."""
    weights, unit = f"weight.{method.weights}", method.train.unit
    if store.spec["provenance"]["plan"]["keep"] == "sum":
        if unit in ("event", "timestep"):
            return Reading("unit_rows", "unit_norms", weights)
        return Reading("rows", None if unit == "sample" else "norms", weights)
    return Reading("rows", None if unit in ("event", "timestep") else "norms", weights, unit_samples=unit == "sample")
