"""The plan of an index, and of queries to it: what both will cost, before they are run.

Passes, batch size and memory are those that :mod:`whence.indexing` and :mod:`whence.querying` themselves count and
choose, for what is not on disk yet. Minutes come from a few batches, projections included; reading and writing of
rows, and decompositions of them, are not timed.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

from whence.attribution import prepare
from whence.checkpoints import Checkpoint
from whence.config import IndexSettings, QuerySettings
from whence.data import ImageData
from whence.errors import ConfigError
from whence.event_table import grid_events
from whence.grid_sums import points_at_once
from whence.indexing import Indexing, ReadyIndex, find_full_store, index_demand, prepare_index, settle_index
from whence.memory import QUERY_BYTES, Footprint, Limits, measure_footprint, num_turns, peak_bytes
from whence.methods import Baseline, Grid, Method
from whence.plan import BATCHES, Plan, PlannedPass, blank_scores, seconds_per_pass
from whence.query_vectors import make_query_side
from whence.querying import places_of_scores
from whence.store import Block, Store
from whence.store_spec import check_serves, events_of, projection_of, trace_settings
from whence.subject import Subject
from whence.workload import PassCount, Workload

INDEX = "index"
"""In the place of a method's name: the pass over the training images."""

_SHARD_BYTES = 500
"""Of a shard and its sidecar, about, beside what they say of arrays and images."""
_BYTES_PER_ARRAY = 130
"""Of an array's name, type, shape and place, in both."""
_BYTES_PER_IMAGE = 80
"""Of a hash, a count and punctuation, beside the image's id."""


def plan_index(
    subject: Subject,
    settings: IndexSettings,
    folder: Path,
    *,
    queries: ImageData | None = None,
    methods: Sequence[Method | Baseline] = (),
    asked: QuerySettings | None = None,
) -> Plan:
    """Say what :func:`whence.indexing.index` will cost, and :func:`whence.querying.query` after it.

    Args:
        subject: Checkpoints, training images and record.
        settings: As for the index.
        folder: The run; only read.
        queries: Query images; without, only the index is planned.
        methods: Declarations, for the queries.
        asked: As for the query.

    Returns:
        The plan: first the index, if anything of it is missing, then passes of queries that share gradients.

    Raises:
        ConfigError: If settings contradict each other, or the memory allowed does not suffice.
        StoreError: If the store would not serve a method; the message says which would.
    """
    settings = settle_index(subject, settings)
    full = find_full_store(subject, settings, folder)
    ready = prepare_index(subject, settings, folder) if full is None else None
    store = full or (ready.store if ready else None)
    assert store is not None
    settled = trace_settings(store.spec, asked or QuerySettings())
    work = None if queries is None else prepare(subject, queries, methods, settled, folder)
    products = work is not None and work.needs_products
    footprint = cache(lambda: measure_footprint(subject, settings, products=products))
    passes = [] if ready is None else _plan_index(subject, ready, footprint())
    if work is None or queries is None:
        return Plan(passes, score_bytes=0)
    if work.baselines:
        raise ConfigError(f"{', '.join(b.name for b in work.baselines)} needs no gradients and so no store.")
    for method in (method for load in work.loads for method in load.methods):
        check_serves(store, method, subject)
    _, folders = places_of_scores(work, store, folder)
    score_bytes = 0
    for load in work.loads:
        wanted = [method for method in load.methods if not (folders[method.name] / "manifest.json").exists()]
        if wanted:
            load = replace(load, methods=wanted)
            score_bytes += sum(blank_scores(work, method, subject, queries).num_bytes for method in wanted)
            passes += _plan_queries(load, store, folder, footprint)
    return Plan(passes, score_bytes)


def _plan_index(subject: Subject, ready: ReadyIndex, footprint: Footprint) -> list[PlannedPass]:
    settings, work = ready.settings, Indexing(subject, ready.settings, ready.store)
    todo = {c: blocks for c, blocks in work.todo.items() if blocks}
    if not todo:
        return []
    passes = [PassCount(c.step, 0, sum(work.num_events(c, b) for b in todo[c])) for c in reversed(todo)]
    setup_s, pass_s = _time_index(subject, ready)
    return [
        PlannedPass(
            methods=(INDEX,),
            passes=passes,
            turns=1,
            batch_size=settings.batch_size,
            seconds=len(todo) * setup_s + sum(count.train for count in passes) * pass_s,
            peak_bytes=peak_bytes(index_demand(subject, settings), footprint, Limits(settings.batch_size, QUERY_BYTES)),
            cache_bytes=0,
            store_bytes=sum(_shard_bytes(work, c, block) for c, blocks in todo.items() for block in blocks),
        )
    ]


def _shard_bytes(work: Indexing, checkpoint: Checkpoint, block: Block) -> int:
    """Count the rows of a shard with their columns, and its sidecar."""
    settings, families = work.settings, 2 if work.settings.keep == "sum" else 1
    row = work.store.width * (4 if settings.rows == "float32" else 2) + 4  # and its norm
    beside = 8 if settings.keep == "sum" else 4  # norm_rms, or the error of the prediction
    columns = 4 + 4 + beside + 8 * len(work.rules)  # sample, timestep
    arrays = 2 * families + 3 + len(work.rules)
    about = _SHARD_BYTES + arrays * _BYTES_PER_ARRAY + sum(len(json.dumps(id_)) + _BYTES_PER_IMAGE for id_ in block)
    return work.num_rows(checkpoint, block) * (families * row + columns) + about


def _time_index(subject: Subject, ready: ReadyIndex) -> tuple[float, float]:
    """Time loading and a sample-pass, at the last checkpoint."""
    settings, train, events = ready.settings, subject.train, events_of(ready.store.spec)
    draws = events.draws if isinstance(events, Grid) else 1
    started_s = time.perf_counter()
    source = subject.source(subject.used_checkpoints(settings.checkpoints)[-1], settings).of(settings.output)
    source.check(train)
    setup_s = time.perf_counter() - started_s
    units = BATCHES * max(1, settings.batch_size // draws)
    num_images = min(len(train), units)
    grid = Grid(timesteps=-(-units // num_images), draws=draws)
    table = grid_events(train, range(num_images), "train", grid, subject.process.num_timesteps, settings.seed)
    table, exact = table.take(slice(0, units * draws)), settings.norms == "exact"
    return setup_s, seconds_per_pass(
        lambda update: source.rows(table, train, ready.projection, update, with_norms=exact, events_per_unit=draws)
    )


def _plan_queries(load: Workload, store: Store, folder: Path, footprint: Callable[[], Footprint]) -> list[PlannedPass]:
    side = make_query_side(load, store, folder / "cache")
    missing, passes = [len(rows) for rows in side.missing().values()], side.passes()
    planned = PlannedPass(
        methods=tuple(method.name for method in load.methods),
        passes=passes,
        turns=1,
        batch_size=load.settings.batch_size,
        seconds=0.0,
        peak_bytes=0,
        cache_bytes=sum(missing) * side.bytes_per_query,
        store_bytes=0,
    )
    if not any(missing):
        return [planned]
    setup_s, pass_s = _time_queries(load, store)
    demand, needs = replace(load.demand, num_queries=side.queries_at_once(max(missing)), train_grid=None), footprint()
    if load.precondition is None:
        points = points_at_once(load.settings.batch_size, load.query_grid, demand.query_parts * needs.gradient)
        held = needs.weights + points * demand.query_parts * needs.gradient
        held += needs.summed(points * load.query_grid.draws)
    else:
        held = peak_bytes(demand, needs, Limits(load.settings.batch_size, QUERY_BYTES))
        planned = replace(planned, turns=num_turns(demand, needs, QUERY_BYTES))
    seconds = sum(count > 0 for count in missing) * setup_s + planned.sample_passes * pass_s
    return [replace(planned, seconds=seconds, peak_bytes=held)]


def _time_queries(load: Workload, store: Store) -> tuple[float, float]:
    """Time loading and a sample-pass of queries, at the last checkpoint."""
    started_s = time.perf_counter()
    source = load.subject.source(load.checkpoints[-1], load.settings).of(load.outputs[1])
    source.check(load.subject.train)
    setup_s = time.perf_counter() - started_s
    direct = source.rank_one_parameters(load.subject.train)
    projection = projection_of(source, store.spec["space"]["projection"], direct)
    parts = 1 + load.halves
    points = BATCHES * points_at_once(source.batch_size, load.query_grid, parts * source.gradient_bytes)
    grid = replace(load.query_grid, timesteps=min(load.query_grid.timesteps, points))
    return setup_s, seconds_per_pass(
        lambda update: source.grid_rows(
            load.queries, [0], "query", grid, projection, halves=load.halves, seed=load.settings.seed, update=update
        )
    )
