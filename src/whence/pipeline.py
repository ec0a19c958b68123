"""The order of the stages, over one folder: a *run*.

    run/ config.yaml  record/  checkpoints/  generated/  stores/  scores/  retraining/  ground_truth/  evaluation/
         report/  cache/

``config.yaml`` says where the images are and how they are read, and, for a model that whence did not train, where that
is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from whence._files import publish_file, write_json
from whence._run_folder import RunFolder
from whence.arguments import Images, Methods, declare, parts
from whence.attribution import trace
from whence.cleaning import Cleaning, clean
from whence.comparison import compare, markdown_table
from whence.config import (
    CleaningSettings,
    CounterfactualSettings,
    IndexSettings,
    QuerySettings,
    RetrainingSettings,
    TraceSettings,
)
from whence.counterfactual import Counterfactual, plan_counterfactual
from whence.data import ImageData, open_images
from whence.diagnosis import diagnose, read_diagnosis
from whence.duplicates import NEAR_DISTANCE
from whence.effects import run_counterfactual
from whence.errors import ConfigError, ScoresError
from whence.event_table import EventBatch, EventTable
from whence.evidence import write_evidence
from whence.export import export
from whence.ground_truth import GroundTruth
from whence.indexing import Part, index
from whence.lds import LdsResult
from whence.methods import Baseline, GradientPlan, Method, method_by_name
from whence.plan import Plan, plan
from whence.plan_index import plan_index
from whence.querying import query
from whence.reliability import Of, Target, query_until, trace_until
from whence.report import write_report
from whence.retraining import retrain
from whence.retrieval import detection_table, retrieval_table
from whence.scores import Scores, TopScores
from whence.self_influence import SELF, Kind, SelfInfluenceCost, self_influence, self_influence_cost
from whence.store import Store
from whence.store_spec import choose_store

if TYPE_CHECKING:
    from whence.opening import open_run as open_run
    from whence.opening import train_run as train_run


@dataclass(frozen=True)
class Run(RunFolder):
    """A folder with a model's training, or with what was traced from a model that others trained.

    Open one with :func:`~whence.opening.open_run`, make one with :func:`~whence.opening.train_run`.
    """

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
        self._note_latest(list(scores.values()), queries, settings)
        return scores

    def pool(self, scores: Scores, name: str) -> Scores:
        """Take all queries of some scores for one, and keep the result in ``scores/``; see :meth:`Scores.pool`.

        Args:
            scores: What :meth:`trace` or :meth:`query` gave.
            name: What to call the one query.

        Returns:
            Scores with one query, loaded from their folder.
        """
        pooled = scores.pool(name)
        folder = self.folder / "scores" / f"{scores.method}-pooled-{pooled.content_hash[:8]}"
        if not folder.exists():
            pooled.save(folder)
        self._show_pooled(scores, folder)
        return Scores.load(folder)

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
            self._note_latest(list(scores.values()), queries, settings)
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

    def retrain(
        self,
        queries: Mapping[str, Images],
        settings: RetrainingSettings | None = None,
        *,
        show_progress: bool = True,
        **changes: Any,
    ) -> GroundTruth:
        """Train models again on subsets of the training set and measure queries; run again, it goes on from there.

        Args:
            queries: Query images, or where they are, by the name of their set, such as validation and generated.
            settings: Subsets, seeds, training, measuring, processes. More than one worker needs
                ``if __name__ == "__main__":`` around what a script does.
            show_progress: Show a progress bar.
            **changes: Single settings by name, as ``subsets=32``.

        Returns:
            The ground truth, which is also in ``ground_truth/``; see :mod:`whence.ground_truth`.
        """
        settings = replace(settings or RetrainingSettings(), **changes)
        opened = {name: self.open_queries(images) for name, images in queries.items()}
        truth = retrain(self.subject, opened, settings, self.folder, show_progress=show_progress)
        self.keep_settings()
        return truth

    def evaluate(
        self,
        ground_truth: GroundTruth | str | Path,
        scores: Sequence[Scores | str | Path] | None = None,
        *,
        measure: str = "loss",
        fit_subsets: int | None = None,
        draws: int = 1000,
        seed: int = 0,
    ) -> tuple[list[LdsResult], dict[str, Any]]:
        """Compare scores with retrained models; see :mod:`whence.lds`. Writes ``evaluation/lds.json`` and ``lds.md``.

        Args:
            ground_truth: Retrained models, or their folder.
            scores: Scores, or their folders. Default: all in ``scores/`` of this run that are of the same images and
                queries; what is left out is told in the notes.
            measure: Which output of the models.
            fit_subsets: Fit empirical influence and datamodels on so many of the subsets, the first ones, and evaluate
                everything on the others.
            draws: Resamples of queries and subsets for the interval.
            seed: Seed of the resamples.

        Returns:
            One result for each method and set of queries, and the table of them; see :func:`whence.comparison.compare`.
        """
        truth = ground_truth if isinstance(ground_truth, GroundTruth) else GroundTruth.load(ground_truth)
        given = None if scores is None else [s if isinstance(s, Scores) else Scores.load(s) for s in scores]
        return compare(truth, self.folder, given, measure=measure, fit_subsets=fit_subsets, draws=draws, seed=seed)

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
            scores = [self._scores_of(images, declared, trace) for declared in declare(methods)]
        loaded = [one if isinstance(one, Scores) else Scores.load(one) for one in scores]
        asked = images.select(images.rows(ids)) if ids else images
        plan = plan_counterfactual(self.subject, asked, loaded, settings, self.folder)
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

    def _scores_of(self, queries: ImageData, method: Method | Baseline, trace: bool) -> Scores:
        """Find the scores of a method for these queries, or trace them."""
        found = []
        for manifest in sorted((self.folder / "scores").glob(f"{method.name}-*/manifest.json")):
            scores = Scores.load(manifest.parent)
            same = scores.details.get("queries", {}).get("fingerprint") == queries.fingerprint
            if same and scores.method == method.name and scores.train_ids == self.train_images.ids:
                found.append(scores)
        if len(found) > 1:
            raise ScoresError(
                f"There are several scores of {method.name} for these queries: "
                f"{', '.join(str(one.folder) for one in found)}. Give one with --scores."
            )
        if not found and not trace:
            raise ScoresError(
                f"There are no scores of {method.name} for these queries yet. Make them with `whence trace`; `whence "
                "plan` tells what that costs."
            )
        return found[0] if found else self.trace(queries, method)[method.name]

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
        given = [one if isinstance(one, Scores) else Scores.load(one) for one in validation]
        wants_self = settings.reasons is None or "outlier" in settings.reasons
        if self_scores is None and wants_self:
            found = sorted((self.folder / "scores").glob("self_*/manifest.json"))
            if len(found) > 1:
                raise ScoresError(
                    f"There is self-influence of several kinds: {', '.join(str(one.parent) for one in found)}. Give "
                    "one with --self-scores."
                )
            self_scores = found[0].parent if found else None
        loaded = self_scores if self_scores is None or isinstance(self_scores, Scores) else Scores.load(self_scores)
        return clean(self.train_images, settings, self_scores=loaded, validation=given, show_progress=show_progress)

    def export(self, cleaning: Cleaning, folder: str | Path) -> Path:
        """Write the images that stay into a new folder, with tables of what stays and what goes.

        Args:
            cleaning: What :meth:`clean` gave.
            folder: A new folder.

        Returns:
            The file or folder with the images, a source for ``whence train``; see :mod:`whence.export`.
        """
        return export(cleaning, Path(folder), self.data_settings)

    def evaluate_rankings(
        self,
        scores: Sequence[Scores | str | Path] | None = None,
        *,
        queries: ImageData | None = None,
        planted: str | None = None,
        k: int = 10,
        near_distance: float = NEAR_DISTANCE,
        lds: Mapping[str, float] | None = None,
    ) -> dict[str, Any]:
        """Measure retrieval and specificity of what was traced last, which needs no retrained models.

        Args:
            scores: Scores for the queries of the last trace, or their folders. Default: all of the last trace.
            queries: The queries, where they were given to :meth:`trace` as opened images.
            planted: Label of a group of training images that queries of that label should find.
            k: Length of a ranking.
            near_distance: Largest pixel distance of near-duplicates.
            lds: Linear datamodeling scores by method, for a column beside.

        Returns:
            The table of :func:`whence.retrieval.retrieval_table`, which is also in ``evaluation/rankings.json``, and as
            Markdown in ``rankings.md``.
        """
        latest, opened, _ = self.load_scores(queries)
        chosen = latest if scores is None else [s if isinstance(s, Scores) else Scores.load(s) for s in scores]
        table = retrieval_table(chosen, self.train_images, opened, planted, k, near_distance=near_distance, lds=lds)
        self._write_table("rankings", table)
        return table

    def evaluate_detection(self, ids: Sequence[str]) -> dict[str, Any]:
        """Measure how self-influence finds training images known to be at fault, such as those with flipped labels.

        Args:
            ids: Their ids.

        Returns:
            The table of :func:`whence.retrieval.detection_table` over all self-influence in ``scores/``, which is also
            in ``evaluation/detection.json`` and ``detection.md``.
        """
        paths = sorted((self.folder / "scores").glob("self*/manifest.json"))
        found = [one for one in (Scores.load(path.parent) for path in paths) if one.query_ids == (SELF,)]
        table = detection_table(found, ids)
        self._write_table("detection", table)
        return table

    def diagnose(
        self,
        *,
        samples: Sequence[str] = (),
        count: int = 20,
        timesteps: int = 100,
        k: int = 10,
        queries: ImageData | None = None,
        show_progress: bool = True,
    ) -> dict[str, dict[str, Any]]:
        """Say how far the scores of the last trace follow the timesteps of training; see :mod:`whence.bias`.

        Args:
            samples: Ids of training images that are scored as if trained at another timestep. Default: some at random.
            count: How many at random; 0: none, and nothing is computed but statistics of the scores.
            timesteps: Points of a norm curve.
            k: Length of a ranking.
            queries: The queries, where they were given to :meth:`trace` as opened images.
            show_progress: Show a progress bar.

        Returns:
            Tables by name, as :func:`whence.diagnosis.diagnose` gives them; ``evaluation/bias.json`` has all that they
            are made of, and :meth:`report` shows it.
        """
        scores, opened, used = self.load_scores(queries)
        traced = set(used) == {field.name for field in fields(TraceSettings)}  # not queried from a store
        return diagnose(
            self.subject,
            opened,
            scores,
            TraceSettings(**{name: _tuples(value) for name, value in used.items()}) if traced else None,
            self.folder,
            samples=samples,
            count=count,
            timesteps=timesteps,
            k=k,
            show_progress=show_progress,
        )

    def _write_table(self, name: str, table: Mapping[str, Any]) -> None:
        write_json(self.folder / "evaluation" / f"{name}.json", table)
        with publish_file(self.folder / "evaluation" / f"{name}.md") as partial:
            partial.write_text(markdown_table(table))

    def report(
        self,
        *,
        queries: ImageData | None = None,
        planted: str | None = None,
        notes: Sequence[str] = (),
        summary: Mapping[str, Any] | None = None,
        scores: Sequence[Scores] = (),
        k: int = 10,
    ) -> Path:
        """Write ``report/index.html`` about what was traced last; with the diagnosis, where :meth:`diagnose` made one.

        Args:
            queries: The queries, where they were given to :meth:`trace` as opened images.
            planted: Label of a group of training images whose retrieval is measured; the table goes on top of the page
                and into ``evaluation/retrieval.json``.
            notes: Lines to put below that table.
            summary: Another table to put on top, as :func:`whence.report.write_report` takes it.
            scores: What to show, of ``queries``. Default: what was traced last.
            k: Images in each ranking.

        Returns:
            The page.

        Raises:
            ConfigError: If scores come without their queries.
        """
        if scores and queries is None:
            raise ConfigError("Scores that are given need their queries too, as opened images.")
        latest, opened, settings = (scores, queries, {}) if scores and queries else self.load_scores(queries)
        scores = list(latest)
        table, shown = None, scores
        if planted is not None or summary is not None:
            # What needs no model is in the table for comparison; its rankings would only lengthen the page.
            shown = [s for s in scores if s.query_timesteps is not None] or scores
        if planted is not None:
            table = retrieval_table(scores, self.train_images, opened, planted, k)
            table["notes"] += notes
        page = write_report(
            self.folder / "report" / "index.html",
            title="Which training images made these?",
            scores=shown,
            train=self.train_images,
            queries=opened,
            summary=summary or table,
            settings=self.settings() | {"trace": settings},
            diagnosis=read_diagnosis(self.folder),
            k=k,
        )
        if table is not None:
            write_json(self.folder / "evaluation" / "retrieval.json", table)
        return page


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


def _tuples(value: Any) -> Any:
    """Bring a setting that was kept as JSON back to its type."""
    return tuple(value) if isinstance(value, list) else value


def __getattr__(name: str) -> Any:
    # open_run and train_run are found here too; their module needs Run, so it cannot be imported above.
    if name not in ("open_run", "train_run"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("whence.opening"), name)
