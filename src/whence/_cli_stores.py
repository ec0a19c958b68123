"""Commands that make stores of projected gradients, ask them and look after them: index, query, verify and merge."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tyro.conf import Positional

from whence._cli_options import Flat, ModelSource, QueryOptions
from whence._cli_printing import print_table
from whence.config import IndexSettings, QuerySettings
from whence.errors import ConfigError

if TYPE_CHECKING:
    from whence.store import Store


def index(
    model: Positional[Path],
    /,
    *,
    part: str | None = None,
    source: Flat[ModelSource] = ModelSource(),  # noqa: B008
    settings: Flat[IndexSettings] = IndexSettings(),  # noqa: B008
    json: bool = False,
) -> None:
    """Put projected gradients of all training images into a store, so that any number of queries cost little later.

    Run again, it goes on from there; run twice at once, both share the work.

    Args:
        model: A run of whence, or a checkpoint folder, pipeline or model saved by diffusers.
        part: Do only this part of the work, as 2/8 for the second of eight; for jobs on several machines.
        source: Where the model is from and what it was trained on.
        settings: Which gradients, their projection, arithmetic.
        json: Print what the store holds as JSON.
    """
    from whence.indexing import notes_on_store

    run = source.open(model)
    store = run.index(settings, part=None if part is None else _part(part))
    rows = [[step, len(store.ids(step)), store.num_rows(step)] for step in store.steps]
    print_table(["step", "images", "rows"], rows, json, store=str(store.folder), notes=notes_on_store(store))


def query(
    model: Positional[Path],
    /,
    *,
    queries: tuple[str, ...],
    methods: tuple[str, ...] = ("tracin", "retrac"),
    store: Path | None = None,
    keep_top: int | None = None,
    until: float | None = None,
    until_of: Literal["median", "worst"] = "median",
    top: int = 5,
    asked: Flat[QueryOptions] = QueryOptions(),  # noqa: B008
    source: Flat[ModelSource] = ModelSource(),  # noqa: B008
    settings: Flat[QuerySettings] = QuerySettings(),  # noqa: B008
    json: bool = False,
) -> None:
    """Rank the training images of a model for each query image, from a store that `whence index` has made.

    Args:
        model: A run of whence, or a checkpoint folder, pipeline or model saved by diffusers.
        queries: Query images: folders, files, or demo-queries.
        methods: Any that the store can serve; `whence methods` lists them.
        store: The store. Default: the one of the run that serves the methods.
        keep_top: Keep only so many training images of each query, where all scores would be too many. No page then.
        until: Reliability, such as 0.95: take no more timesteps and draws of the queries than reach it. --timesteps and
            --draws are then the most that are taken.
        until_of: Reliability of the median query, or of the worst.
        top: Training images to print for each query.
        asked: What is said of the queries.
        source: Where the model is from and what it was trained on.
        settings: Size of the query grid, batch size.
        json: Print the rankings as JSON.
    """
    run = source.open(model)
    scores = run.query(asked.of(queries), methods, settings, store=store, top=keep_top, until=until, until_of=until_of)
    asked.print(run, scores, top, json)


def verify(path: Positional[Path], /, *, json: bool = False) -> None:
    """Read all of a store, or of all stores of a run, and name what is damaged, missing or left behind.

    Ends with status 1 where something is.

    Args:
        path: A store or a run.
        json: Print the findings as JSON.
    """
    stores = _open_stores(path)
    findings = [[str(store.folder), finding] for store in stores for finding in store.verify()]
    print_table(["store", "finding"], findings, json, verified=len(stores))
    if findings:
        sys.exit(1)


def merge(target: Positional[Path], sources: Positional[tuple[Path, ...]], /, *, json: bool = False) -> None:
    """Take the shards of stores that were filled apart over into one of them, or into a new folder.

    Args:
        target: Store that is to hold everything.
        sources: Stores of the same specification; they stay as they are.
        json: Print the result as JSON.
    """
    from whence.store import Store, merge_stores

    found = [Store.open(source) for source in sources]
    if not (target / "manifest.json").exists() and found:
        Store.create(target, found[0].spec, width=found[0].width, dtype=found[0].dtype)
    opened = Store.open(target)
    count = merge_stores(opened, found)
    rows = [[step, len(opened.ids(step)), opened.num_rows(step)] for step in opened.steps]
    print_table(["step", "images", "rows"], rows, json, store=str(target), shards_taken_over=count)


def _open_stores(path: Path) -> "list[Store]":
    from whence.errors import StoreError
    from whence.store import Store

    if (path / "manifest.json").exists():
        return [Store.open(path)]
    folders = sorted((path / "stores").glob("*"))
    if not folders:
        raise StoreError(f"{path} is no store, and there is none in {path / 'stores'}. Make one with `whence index`.")
    return [Store.open(folder) for folder in folders]


def _part(text: str) -> tuple[int, int]:
    """Read 2/8 as (2, 8)."""
    which, slash, count = text.partition("/")
    if not (slash and which.isdecimal() and count.isdecimal()):
        raise ConfigError(f"--part must be like 2/8, the second of eight; found {text}.")
    return int(which), int(count)
