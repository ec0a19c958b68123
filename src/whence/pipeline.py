"""The order of the stages, over one folder: a *run*.

    run/ config.yaml  record/  checkpoints/  generated/  stores/  scores/  retraining/  ground_truth/  evaluation/
         report/  cache/

``config.yaml`` says where the images are and how they are read, and, for a model that whence did not train, where that
is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from whence._run_evaluation import RunEvaluation
from whence._run_scores import find_scores, find_self_influence, keep_pooled, load_all, note_latest
from whence.arguments import Images, Methods, declare, parts
from whence.attribution import trace
from whence.cleaning import Cleaning, clean
from whence.config import (
    CleaningSettings,
    CounterfactualSettings,
    IndexSettings,
    QuerySettings,
    SamplingSettings,
    TraceSettings,
)
from whence.counterfactual import Counterfactual, plan_counterfactual
from whence.data import ImageData, open_images
from whence.effects import run_counterfactual
from whence.errors import ConfigError, ScoresError
from whence.event_table import EventBatch, EventTable
from whence.evidence import write_evidence
from whence.export import export
from whence.generated import generate
from whence.indexing import Part, index
from whence.methods import Baseline, GradientPlan, Method, method_by_name
from whence.plan import Plan, plan
from whence.plan_index import plan_index
from whence.querying import query
from whence.reliability import Of, Target, query_until, trace_until
from whence.scores import Scores, TopScores
from whence.self_influence import Kind, SelfInfluenceCost, self_influence, self_influence_cost
from whence.store import Store
from whence.store_spec import choose_store

if TYPE_CHECKING:
    from whence.opening import open_run as open_run
    from whence.opening import train_run as train_run


@dataclass(frozen=True)
class Run(RunEvaluation):
    """A folder with a model's training, or with what was traced from a model that others trained.

    Open one with :func:`~whence.opening.open_run`, make one with :func:`~whence.opening.train_run`.
    """

    def sample(
        self, count: int, settings: SamplingSettings | None = None, *, show_progress: bool = True, **changes: Any
    ) -> Path:
        """Sample images from the last checkpoint into ``generated/``; what is there already is not sampled again.

        Args:
            count: How many; of each prompt, where there are some.
            settings: Prompts, guidance, steps, seed.
            show_progress: Show a progress bar.
            **changes: Single settings by name, as ``prompts=["a red cat"]``.

        Returns:
            A file that opens as images, with all its decimals and with the prompts as captions (and labels).

        Raises:
            ConfigError: If ``count`` or ``steps`` is not above 0, or prompts are missing or are not for this model.
            DataError: If a prompt has too many words, or is no label of the model.
        """
        settings = replace(settings or SamplingSettings(), **changes)
        if count < 1 or settings.steps < 1:
            raise ConfigError(f"count and steps must be above 0; found {count} and {settings.steps}.")
        file = generate(self.subject, self.encoding, self.folder, count, settings, show_progress=show_progress)
        self.keep_settings()
        return file

    def trace(
        self,
        queries: Images,
        methods: Methods = ("tracin", "retrac"),
        settings: TraceSettings | None = None,
        *,
        until: float | None = None,
        until_of: Of = "median",
        show_progress: bool = True,
        **changes: Any,
    ) -> dict[str, Scores]:
        """Score every training image for every query.

        Args:
            queries: Query images, or where they are.
            methods: Names of methods, or declarations of your own.
            settings: Size of the grids and the like. Default: those of Diffusion-ReTrac, 100 timesteps x 16 draws.
            until: Take no more timesteps and draws than give this reliability; see :mod:`whence.reliability`.
            until_of: Reliability of the median or of the worst query.
            show_progress: Show a progress bar.
            **changes: Single settings by name, as ``timesteps=16``.

        Returns:
            Scores by method name. They are also in ``scores/``, and are not computed again.
        """
        settings = replace(settings or TraceSettings(), **changes)
        images = self.open_queries(queries)
        declared = declare(methods)
        if until is not None:
            asked = (self.subject, images, declared, settings, self.folder, Target(until, until_of))
            scores, settings = trace_until(*asked, show_progress=show_progress)
        else:
            scores = trace(self.subject, images, declared, settings, self.folder, show_progress=show_progress)
        self.keep_settings()
        note_latest(self.folder, list(scores.values()), queries, settings)
        return scores

    def pool(self, scores: Scores, name: str) -> Scores:
        """Take all queries of some scores for one, and keep the result in ``scores/``; see :meth:`Scores.pool`.

        Args:
            scores: What :meth:`trace` or :meth:`query` gave.
            name: What to call the one query.

        Returns:
            Scores with one query, loaded from their folder.
        """
        return Scores.load(keep_pooled(self.folder, scores, name))

    def plan(
        self,
        queries: Images,
        methods: Methods = ("tracin", "retrac"),
        settings: TraceSettings | None = None,
        **changes: Any,
    ) -> Plan:
        """Say what :meth:`trace` will cost: passes, minutes, turns, memory, disk. Nothing is written.

        Args:
            queries: Query images, or where they are.
            methods: Names of methods, or declarations of your own.
            settings: As for :meth:`trace`.
            **changes: Single settings by name.

        Returns:
            The plan; see :mod:`whence.plan`.
        """
        settings = replace(settings or TraceSettings(), **changes)
        images = self.open_queries(queries)
        return plan(self.subject, images, declare(methods), settings, self.folder)

    def plan_index(
        self,
        settings: IndexSettings | None = None,
        *,
        queries: Images = (),
        methods: Methods = ("tracin", "retrac"),
        asked: QuerySettings | None = None,
        **changes: Any,
    ) -> Plan:
        """Say what :meth:`index`, and :meth:`query` after it, will cost; see :mod:`whence.plan_index`.

        Args:
            settings: As for :meth:`index`.
            queries: Query images, or where they are. Without, only the index is planned.
            methods: As for :meth:`query`.
            asked: Settings of :meth:`query`.
            **changes: Single settings of the index by name, as ``width=8192``.

        Returns:
            The plan.
        """
        settings = replace(settings or IndexSettings(), **changes)
        images = self.open_queries(queries) if parts(queries) else None
        return plan_index(self.subject, settings, self.folder, queries=images, methods=declare(methods), asked=asked)

    def index(
        self,
        settings: IndexSettings | None = None,
        *,
        part: Part | None = None,
        show_progress: bool = True,
        **changes: Any,
    ) -> Store:
        """Put projected gradients of all training images into ``stores/``; run again, it goes on from there.

        Args:
            settings: Which gradients, and how they are projected.
            part: Do only the k-th of n parts of the work: (k, n). For jobs on several machines.
            show_progress: Show a progress bar.
            **changes: Single settings by name, as ``width=8192``.

        Returns:
            The store.
        """
        settings = replace(settings or IndexSettings(), **changes)
        store = index(self.subject, settings, self.folder, part=part, show_progress=show_progress)
        self.keep_settings()
        return store

    def query(
        self,
        queries: Images,
        methods: Methods = ("tracin", "retrac"),
        settings: QuerySettings | None = None,
        *,
        store: Store | str | Path | None = None,
        top: int | None = None,
        until: float | None = None,
        until_of: Of = "median",
        show_progress: bool = True,
        **changes: Any,
    ) -> dict[str, Scores | TopScores]:
        """Score every training image for every query from a store; see :mod:`whence.querying`.

        Args:
            queries: Query images, or where they are.
            methods: Names of methods, or declarations of your own.
            settings: Size of the query grid and the like.
            store: A store, or its folder. Default: the one in ``stores/`` that serves the methods.
            top: Keep only so many images of each query.
            until: Take no more timesteps and draws than give this reliability; see :mod:`whence.reliability`.
            until_of: Reliability of the median or of the worst query.
            show_progress: Show a progress bar.
            **changes: Single settings by name, as ``timesteps=16``.

        Returns:
            Scores by method name. They are also in ``scores/``, and are not computed again.

        Raises:
            ConfigError: If ``until`` is given with ``top``.
        """
        settings = replace(settings or QuerySettings(), **changes)
        images, declared = self.open_queries(queries), declare(methods)
        if not isinstance(store, Store):
            folders = [Path(store)] if store is not None else sorted((self.folder / "stores").glob("*"))
            store = choose_store([Store.open(folder) for folder in folders], self.subject, declared)
        if until is not None and top is not None:
            raise ConfigError("The reliability that until asks for is that of all scores; leave keep_top out.")
        scores: Mapping[str, Scores | TopScores]
        if until is not None:
            asked = (self.subject, store, images, declared, settings, self.folder, Target(until, until_of))
            scores, settings = query_until(*asked, show_progress=show_progress)
        else:
            scores = query(
                self.subject, store, images, declared, settings, self.folder, top=top, show_progress=show_progress
            )
        self.keep_settings()
        if top is None:  # a page needs all scores
            note_latest(self.folder, list(scores.values()), queries, settings)
        return dict(scores)

    def self_influence_cost(self, kind: Kind, settings: TraceSettings) -> SelfInfluenceCost:
        """Count what :meth:`self_influence` costs."""
        return self_influence_cost(self.subject, kind, settings)

    def self_influence(
        self,
        kind: Kind = "self_norm",
        settings: TraceSettings | None = None,
        *,
        method: str = "tracin",
        show_progress: bool = True,
    ) -> Scores:
        """Score every training image for itself; see :mod:`whence.self_influence`."""
        declared = method_by_name(method)
        if declared.name not in ("tracin", "retrac") or not isinstance(declared, Method):
            raise ConfigError(f"Self-influence is defined for tracin and retrac, not for {method}.")
        scores = self_influence(
            self.subject, kind, settings or TraceSettings(), self.folder, method=declared, show_progress=show_progress
        )
        self.keep_settings()
        return scores

    def plan_counterfactual(
        self,
        queries: Images,
        scores: Sequence[Scores | str | Path] | None = None,
        settings: CounterfactualSettings | None = None,
        *,
        methods: Methods = "retrac",
        ids: Sequence[str] = (),
        trace: bool = True,
        **changes: Any,
    ) -> Counterfactual:
        """Decide which models show what becomes of queries without the images that methods rank first.

        Args:
            queries: Query images, or where they are.
            scores: Scores of one or more methods, or their folders. Default: those of ``methods`` for these very
                queries; what is not in ``scores/`` is traced first.
            settings: How many images, seeds, training, measuring, processes.
            methods: Which scores, where none are given.
            ids: Ask about these queries only. Default: all.
            trace: Trace what is not there; otherwise it is an error.
            **changes: Single settings by name, as ``top=(20,)``.

        Returns:
            The plan; its :meth:`~whence.counterfactual.Counterfactual.cost` tells what it costs.
        """
        settings = replace(settings or CounterfactualSettings(), **changes)
        images = self.open_queries(queries)
        if scores is None:
            scores = [self._found_or_traced(images, declared, trace) for declared in declare(methods)]
        asked = images.select(images.rows(ids)) if ids else images
        plan = plan_counterfactual(self.subject, asked, load_all(scores), settings, self.folder)
        self.keep_settings()
        return plan

    def prove(self, plan: Counterfactual, *, show_progress: bool = True) -> tuple[dict[str, Any], Path]:
        """Train the models of a plan, compare them, and write table and page; run again, it goes on from there.

        Args:
            plan: What :meth:`plan_counterfactual` gave.
            show_progress: Show a progress bar.

        Returns:
            The content of ``counterfactual.json``, and the page beside it in ``evaluation/``.
        """
        record = run_counterfactual(plan, show_progress=show_progress)
        images = plan.folder / "images.safetensors"
        page = write_evidence(
            plan.folder / "index.html",
            record=record,
            train=self.train_images,
            queries=plan.work.queries,
            drawn=open_images(images) if images.exists() else None,
        )
        return record, page

    def _found_or_traced(self, queries: ImageData, method: Method | Baseline, trace: bool) -> Scores:
        found = find_scores(self.folder, method, queries, self.train_images.ids)
        if found is None and not trace:
            raise ScoresError(
                f"There are no scores of {method.name} for these queries yet. Make them with `whence trace`; `whence "
                "plan` tells what that costs."
            )
        return found or self.trace(queries, method)[method.name]

    def clean(
        self,
        settings: CleaningSettings | None = None,
        *,
        self_scores: Scores | str | Path | None = None,
        validation: Sequence[Scores | str | Path] = (),
        show_progress: bool = True,
        **changes: Any,
    ) -> Cleaning:
        """Decide which training images had better go: duplicates, outliers, harmful ones; see :mod:`whence.cleaning`.

        Args:
            settings: Reasons and thresholds.
            self_scores: Self-influence, or its folder. Default: the one in ``scores/``, if there is one.
            validation: Scores for validation queries, or their folders.
            show_progress: Show a progress bar.
            **changes: Single settings by name, as ``near=0.0``.

        Returns:
            The decision; nothing is written. :meth:`export` writes what stays.

        Raises:
            ScoresError: If there are several kinds of self-influence, or scores do not fit.
        """
        settings = replace(settings or CleaningSettings(), **changes)
        given = load_all(validation)
        if self_scores is not None:
            (self_scores,) = load_all([self_scores])
        elif settings.reasons is None or "outlier" in settings.reasons:
            self_scores = find_self_influence(self.folder)
        return clean(
            self.train_images, settings, self_scores=self_scores, validation=given, show_progress=show_progress
        )

    def export(self, cleaning: Cleaning, folder: str | Path) -> Path:
        """Write the images that stay into a new folder, with tables of what stays and what goes.

        Args:
            cleaning: What :meth:`clean` gave.
            folder: A new folder.

        Returns:
            The file or folder with the images, a source for ``whence train``; see :mod:`whence.export`.
        """
        return export(cleaning, Path(folder), self.data_settings)


def events(
    plan: GradientPlan, ids: Sequence[str], run: Run, *, checkpoint: int = -1, seed: int = 0
) -> tuple[EventTable, EventBatch]:
    """Hand out noise, timestep, x_t, target and weight of training samples' events.

    With these, a model and autograd, anyone can compute a score by hand.

    Args:
        plan: Which events, as in a method's declaration: ``RETRAC.train``, or one of your own.
        ids: Ids of training samples.
        run: Where they were trained.
        checkpoint: Number of the checkpoint, as a list index; for replays.
        seed: Seed of the noise of a grid.

    Returns:
        The events by their keys, and the arrays, in the order of the ids, then of training.
    """
    return run.events(plan, ids, checkpoint=checkpoint, seed=seed)


def __getattr__(name: str) -> Any:
    # open_run and train_run are found here too; their module needs Run, so it cannot be imported above.
    if name not in ("open_run", "train_run"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("whence.opening"), name)
