"""Scores in the folder of a run: those that were traced last, those of a method, those of images for themselves.

``scores/latest.json`` says which were traced last, of which queries and with which settings: what a page shows.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from whence._files import write_json
from whence.arguments import Images, Queries, sources
from whence.config import QuerySettings, TraceSettings
from whence.data import ImageData
from whence.errors import ScoresError
from whence.methods import Baseline, Method
from whence.scores import Scores, TopScores


@dataclass(frozen=True)
class Latest:
    """What was traced last."""

    scores: list[Scores]
    """In the order they were asked for."""
    sources: list[str | None]
    """Of the queries; None where they were given as opened images."""
    told: dict[str, Any] | None
    """What was said of the queries beside where they are."""
    settings: dict[str, Any]

    @property
    def queries(self) -> Images:
        """The queries as they were given.

        Raises:
            ScoresError: If they were given as opened images.
        """
        if None in self.sources:
            raise ScoresError("The queries were given as opened images, not as files; pass them as queries=....")
        named = [source for source in self.sources if source is not None]
        return Queries(named, **self.told) if self.told else named


def note_latest(
    folder: Path, scores: Sequence[Scores | TopScores], queries: Images, settings: TraceSettings | QuerySettings
) -> None:
    """Remember what was traced last."""
    write_json(
        _latest_of(folder),
        {
            "folders": [s.folder.name for s in scores if s.folder],
            "queries": sources(queries),
            "told": queries.told() if isinstance(queries, Queries) else None,
            "settings": asdict(settings),
        },
    )


def load_latest(folder: Path) -> Latest:
    """Load what was traced last.

    Raises:
        ScoresError: If nothing was traced, or what says so is damaged.
    """
    path = _latest_of(folder)
    if not path.exists():
        raise ScoresError(f"{folder} has no scores yet. Make some with `whence trace`.")
    try:
        latest = json.loads(path.read_text())
        folders, queries, settings = latest["folders"], latest["queries"], latest["settings"]
        told = latest.get("told")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ScoresError(f"{path} is damaged ({error!r}). Trace again; what is computed is used.") from error
    return Latest([Scores.load(folder / "scores" / name) for name in folders], queries, told, settings)


def keep_pooled(folder: Path, scores: Scores, name: str) -> Path:
    """Keep some scores with their queries taken for one; a page shows these in the place of those.

    Args:
        folder: The run.
        scores: Of several queries.
        name: What to call the one query.

    Returns:
        The folder of the pooled scores.
    """
    pooled = scores.pool(name)
    kept = folder / "scores" / f"{scores.method}-pooled-{pooled.content_hash[:8]}"
    if not kept.exists():
        pooled.save(kept)
    path = _latest_of(folder)
    latest = json.loads(path.read_text()) if path.exists() else {"folders": []}
    if scores.folder is not None and scores.folder.name in latest["folders"]:
        shown = [kept.name if name == scores.folder.name else name for name in latest["folders"]]
        write_json(path, latest | {"folders": shown})
    return kept


def shown_as_one(scores: list[Scores], queries: ImageData) -> tuple[list[Scores], ImageData]:
    """Let the first of queries that were taken together stand for all of them.

    Raises:
        ScoresError: If the queries are not those that were scored.
    """
    names = {one.query_ids for one in scores if "pooled" in one.details}
    if not names:
        return scores, queries
    for one in scores:
        asked = one.details.get("queries", {})
        if asked.get("fingerprint") not in (None, queries.fingerprint):
            raise ScoresError(
                f"The query images in {queries.source} changed since the {one.method} scores were made. Restore "
                "them, or trace again."
            )
    caption = f"{len(queries)} queries taken together; the first is shown"
    first = replace(queries.select([0]), ids=names.pop(), captions=(caption,))
    shown = {"fingerprint": first.fingerprint}
    return [replace(one, details=one.details | {"queries": one.details["queries"] | shown}) for one in scores], first


def as_trace_settings(used: Mapping[str, Any]) -> TraceSettings | None:
    """Bring settings that were kept as JSON back; None where they are of a query to a store.

    Settings that did not exist yet when these were kept have their defaults, with which everything is as it was then.
    """
    known, of_query = ({field.name for field in fields(kind)} for kind in (TraceSettings, QuerySettings))
    if not used.keys() - of_query or used.keys() - known:
        return None
    values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in used.items()}
    return TraceSettings(**values)


def load_all(scores: Iterable[Scores | str | Path]) -> list[Scores]:
    """Load those scores that are given by their folders."""
    return [one if isinstance(one, Scores) else Scores.load(one) for one in scores]


def find_scores(folder: Path, method: Method | Baseline, queries: ImageData, train_ids: Sequence[str]) -> Scores | None:
    """Find the scores of a method for these queries.

    Returns:
        None where there are none yet.

    Raises:
        ScoresError: If there are several.
    """
    found = []
    for manifest in sorted((folder / "scores").glob(f"{method.name}-*/manifest.json")):
        scores = Scores.load(manifest.parent)
        same = scores.details.get("queries", {}).get("fingerprint") == queries.fingerprint
        if same and scores.method == method.name and scores.train_ids == train_ids:
            found.append(scores)
    if len(found) > 1:
        raise ScoresError(
            f"There are several scores of {method.name} for these queries: "
            f"{', '.join(str(one.folder) for one in found)}. Give one with --scores."
        )
    return found[0] if found else None


def find_self_influence(folder: Path) -> Scores | None:
    """Find the self-influence of the training images.

    Returns:
        None where there is none yet.

    Raises:
        ScoresError: If there are several kinds.
    """
    found = sorted((folder / "scores").glob("self_*/manifest.json"))
    if len(found) > 1:
        raise ScoresError(
            f"There is self-influence of several kinds: {', '.join(str(one.parent) for one in found)}. Give one with "
            "--self-scores."
        )
    return Scores.load(found[0].parent) if found else None


def _latest_of(folder: Path) -> Path:
    return folder / "scores" / "latest.json"
