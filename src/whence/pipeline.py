"""The order of the stages, over one folder: a *run*.

    run/ config.yaml  record/  checkpoints/  generated/  stores/  scores/  retraining/  ground_truth/  evaluation/
         report/  cache/

``config.yaml`` says where the images are and how they are read, and, for a model that whence did not train, where that
is.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy import ndarray

from whence._files import publish_file, write_json
from whence.attribution import trace
from whence.checkpoints import list_checkpoints, load_model, load_scheduler
from whence.cleaning import Cleaning, clean
from whence.comparison import compare, markdown_table
from whence.config import (
    CleaningSettings,
    CounterfactualSettings,
    DataSettings,
    IndexSettings,
    LossName,
    ModelSettings,
    QuerySettings,
    RetrainingSettings,
    TraceSettings,
    TrainingSettings,
)
from whence.counterfactual import Counterfactual, plan_counterfactual
from whence.data import ImageData, concatenate, open_images, save_arrays
from whence.diagnosis import diagnose
from whence.duplicates import NEAR_DISTANCE
from whence.effects import run_counterfactual
from whence.errors import ConfigError, DataError, RecordError, ScoresError, check_choice
from whence.event_table import EventBatch, EventTable, grid_events, make_batch
from whence.evidence import write_evidence
from whence.export import export
from whence.ground_truth import GroundTruth
from whence.indexing import Part, index
from whence.lds import LdsResult
from whence.methods import Baseline, GradientPlan, Grid, Method, RetrainingMethod, Trajectory, method_by_name
from whence.plan import Plan, plan
from whence.plan_index import plan_index
from whence.querying import query
from whence.record import Record, read_manifest
from whence.reliability import Of, Target, query_until, trace_until
from whence.replay_check import CheckRow, check_run
from whence.report import write_report
from whence.retraining import retrain
from whence.retrieval import detection_table, retrieval_table
from whence.sampling import sample_images
from whence.scores import Scores, TopScores
from whence.self_influence import SELF, Kind, SelfInfluenceCost, self_influence, self_influence_cost
from whence.store import Store
from whence.store_spec import choose_store
from whence.subject import Subject
from whence.training import train
from whence.trajectories import Trajectories

FORMAT_VERSION = 1

BUNDLED = ("demo", "demo-queries")
"""Sources that come with whence."""

Images = str | Path | ImageData | Sequence[str | Path | ImageData]
"""Where images come from: a source, opened images, or several of these."""


Methods = str | Method | Baseline | Sequence[str | Method | Baseline]
"""Methods by name, or declarations of one's own."""


@dataclass(frozen=True)
class Run:
    """A folder with a model's training, or with what was traced from a model that others trained.

    Open one with :func:`open_run`, make one with :func:`train_run`.
    """

    folder: Path
    data_source: str
    data_settings: DataSettings
    model: Path
    """Where the checkpoints are: the run itself, or a folder of someone else's."""
    loss: LossName
    allow_pickle: bool = False

    @cached_property
    def train_images(self) -> ImageData:
        """The training images."""
        try:
            return open_images(self.data_source, self.data_settings)
        except DataError as error:
            if Path(self.data_source).exists() or self.data_source in BUNDLED:
                raise
            raise DataError(f"{error} If the images were moved, say with --data where they are now.") from error

    @cached_property
    def record(self) -> Record | None:
        """The record of training, or None."""
        folder = self.model / "record"
        if folder.exists() and not (folder / "manifest.json").exists():
            raise RecordError(
                f"{folder} has no manifest.json, so what is in it cannot be used. Restore it; or, to trace the model "
                "as one without a record, move the folder away."
            )
        return Record.open(folder) if folder.exists() else None

    @cached_property
    def subject(self) -> Subject:
        """What is traced."""
        return Subject(list_checkpoints(self.model), self.train_images, self.record, self.loss, self.allow_pickle)

    def open_queries(self, queries: Images) -> ImageData:
        """Open query images and read them at the size of the training images."""
        parts = _parts(queries)
        if not parts:
            raise ConfigError("Give at least one query image.")
        columns = dict.fromkeys(("image_column", "id_column", "label_column", "caption_column"))
        settings = replace(self.data_settings, **columns)
        return concatenate([p if isinstance(p, ImageData) else open_images(p, settings) for p in parts])

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
        declared = _declared(methods)
        if until is not None:
            asked = (self.subject, images, declared, settings, self.folder, Target(until, until_of))
            scores, settings = trace_until(*asked, show_progress=show_progress)
        else:
            scores = trace(self.subject, images, declared, settings, self.folder, show_progress=show_progress)
        self._note_latest(list(scores.values()), queries, settings)
        return scores

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
        return plan(self.subject, images, _declared(methods), settings, self.folder)

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
        images = self.open_queries(queries) if _parts(queries) else None
        return plan_index(self.subject, settings, self.folder, queries=images, methods=_declared(methods), asked=asked)

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
        return index(self.subject, settings, self.folder, part=part, show_progress=show_progress)

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
        images, declared = self.open_queries(queries), _declared(methods)
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
        if top is None:  # a page needs all scores
            self._note_latest(list(scores.values()), queries, settings)
        return dict(scores)

    def _note_latest(
        self, scores: Sequence[Scores | TopScores], queries: Images, settings: TraceSettings | QuerySettings
    ) -> None:
        """Remember what :meth:`report` shows."""
        write_json(
            self.folder / "scores" / "latest.json",
            {
                "folders": [s.folder.name for s in scores if s.folder],
                "queries": _sources(queries),
                "settings": asdict(settings),
            },
        )

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
        return self_influence(
            self.subject, kind, settings or TraceSettings(), self.folder, method=declared, show_progress=show_progress
        )

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
        return retrain(self.subject, opened, settings, self.folder, show_progress=show_progress)

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
            scores = [self._scores_of(images, declared, trace) for declared in _declared(methods)]
        loaded = [one if isinstance(one, Scores) else Scores.load(one) for one in scores]
        asked = images.select(images.rows(ids)) if ids else images
        return plan_counterfactual(self.subject, asked, loaded, settings, self.folder)

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
        count: int = 3,
        timesteps: int = 100,
        k: int = 10,
        queries: ImageData | None = None,
        show_progress: bool = True,
    ) -> dict[str, Any]:
        """Say how far the scores of the last trace follow the timesteps of training; see :mod:`whence.bias`.

        Args:
            samples: Ids of training images that are scored as if trained at another timestep. Default: some at random.
            count: How many at random; 0: none, and nothing is computed but statistics of the scores.
            timesteps: Points of a norm curve.
            k: Length of a ranking.
            queries: The queries, where they were given to :meth:`trace` as opened images.
            show_progress: Show a progress bar.

        Returns:
            A table, one row per method; ``evaluation/bias.json`` has all that it is made of.
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

    def check(self, *, device: str = "cpu") -> list[CheckRow]:
        """Compare the record with itself and with the checkpoints; see :mod:`whence.replay_check`.

        Args:
            device: Torch device.

        Returns:
            One verdict on the keys, and one for each checkpoint.

        Raises:
            RecordError: If there is no record, or it is damaged or of other images.
        """
        self._check_recorded()
        return check_run(self.subject, device=device)

    def events(
        self, plan: GradientPlan, ids: Sequence[str], *, checkpoint: int = -1, seed: int = 0
    ) -> tuple[EventTable, EventBatch]:
        """Hand out the events at which training samples are taken, as arrays; see :func:`events`."""
        rows = self.train_images.rows(ids)
        process = self.subject.process
        if isinstance(plan.events, Grid):
            table = grid_events(self.train_images, rows, "train", plan.events, process.num_timesteps, seed)
        elif isinstance(plan.events, Trajectory):
            raise ConfigError("Trajectories are of queries, not of training images: these are replayed or on a grid.")
        else:
            self._check_recorded()
            checkpoints, replays = self.subject.checkpoints, self.subject.replays
            assert replays is not None  # there is a record
            if not -len(checkpoints) <= checkpoint < len(checkpoints):
                raise ConfigError(
                    f"There are {len(checkpoints)} checkpoints, 0 to {len(checkpoints) - 1}; found {checkpoint}."
                )
            step = checkpoints[checkpoint].step
            everything = replays.events(self.subject.previous_step[step], step, plan.events, "learning_rate")
            table = everything.take(np.concatenate([np.flatnonzero(everything.row == row) for row in rows]))
        return table, make_batch(table, self.train_images, process)

    def _check_recorded(self) -> None:
        if self.record is None:
            read_manifest(self.model / "record")  # raises, saying what is missing

    def sample(
        self, count: int, *, steps: int = 50, seed: int = 0, trajectory: bool = False, show_progress: bool = True
    ) -> Path:
        """Sample images from the last checkpoint into ``generated/``; what is there already is not sampled again.

        Args:
            count: How many.
            steps: Denoising steps of DDIM.
            seed: Seed of the noise; the k-th image depends on it and k alone.
            trajectory: Also keep what the sampler took each image to be at each step, as journey-trak needs it.
            show_progress: Show a progress bar.

        Returns:
            A file that opens as images, with all its decimals.

        Raises:
            ConfigError: If ``count`` or ``steps`` is not above 0.
        """
        if count < 1 or steps < 1:
            raise ConfigError(f"count and steps must be above 0; found {count} and {steps}.")
        last = self.subject.checkpoints[-1]
        name = f"ddim{steps}-{count}-seed{seed}-step{last.step}-{last.content_hash()[:8]}"
        path = self.folder / "generated" / f"{name}{'-trajectory' if trajectory else ''}.safetensors"
        if not path.exists():
            ids = [f"generated-{k}" for k in range(count)]
            frames: dict[int, ndarray] = {}
            images = sample_images(
                load_model(last, allow_pickle=self.allow_pickle),
                load_scheduler(last),
                ids,
                steps=steps,
                seed=seed,
                show_progress=show_progress,
                keep=frames.__setitem__ if trajectory else None,
            )
            about = {"checkpoint_step": last.step, "checkpoint_sha256": last.content_hash()}
            about |= {"sampler": "ddim", "eta": 0.0, "steps": steps, "seed": seed}
            timesteps = tuple(sorted(frames))
            kept = [frames[t] for t in timesteps]
            path_taken = Trajectories(np.stack(kept, axis=1), timesteps, (about,) * count) if trajectory else None
            save_arrays(path, images, ids, ["generated"] * count, path_taken)
        return path

    def load_scores(self, queries: ImageData | None = None) -> tuple[list[Scores], ImageData, dict[str, Any]]:
        """Load what was traced last: scores, queries, settings.

        Args:
            queries: The queries, where they were given to :meth:`trace` as opened images.

        Returns:
            Scores in the order they were asked for, the queries, and the settings.

        Raises:
            ScoresError: If nothing was traced, or the queries are not where they were.
        """
        path = self.folder / "scores" / "latest.json"
        if not path.exists():
            raise ScoresError(f"{self.folder} has no scores yet. Make some with `whence trace`.")
        try:
            latest = json.loads(path.read_text())
            folders, sources, settings = latest["folders"], latest["queries"], latest["settings"]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ScoresError(f"{path} is damaged ({error!r}). Trace again; what is computed is used.") from error
        scores = [Scores.load(self.folder / "scores" / name) for name in folders]
        if queries is not None:
            return scores, queries, settings
        if None in sources:
            raise ScoresError("The queries were given as opened images, not as files; pass them as queries=....")
        try:
            return scores, self.open_queries(sources), settings
        except DataError as error:
            raise ScoresError(f"The queries of the last trace cannot be opened again: {error}") from error

    def report(
        self, *, queries: ImageData | None = None, planted: str | None = None, notes: Sequence[str] = (), k: int = 10
    ) -> Path:
        """Write ``report/index.html`` about what was traced last.

        Args:
            queries: The queries, where they were given to :meth:`trace` as opened images.
            planted: Label of a group of training images whose retrieval is measured; the table goes on top of the page
                and into ``evaluation/retrieval.json``.
            notes: Lines to put below that table.
            k: Images in each ranking.

        Returns:
            The page.
        """
        scores, opened, settings = self.load_scores(queries)
        table, shown = None, scores
        if planted is not None:
            # What needs no model is in the table for comparison; its rankings would only lengthen the page.
            shown = [s for s in scores if s.query_timesteps is not None] or scores
            table = retrieval_table(scores, self.train_images, opened, planted, k)
            table["notes"] += notes
        page = write_report(
            self.folder / "report" / "index.html",
            title="Which training images made these?",
            scores=shown,
            train=self.train_images,
            queries=opened,
            summary=table,
            settings=self.settings() | {"trace": settings},
            k=k,
        )
        if table is not None:
            write_json(self.folder / "evaluation" / "retrieval.json", table)
        return page

    def settings(self) -> dict[str, Any]:
        """Give the content of ``config.yaml``, and the training settings of the record."""
        config = yaml.safe_load((self.folder / "config.yaml").read_text())
        return config | ({"training": self.record.manifest["config"]} if self.record else {})


def open_run(
    path: str | Path,
    *,
    data: str | None = None,
    data_settings: DataSettings | Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    loss: LossName | None = None,
    allow_pickle: bool = False,
) -> Run:
    """Open a run, or a model that others trained.

    Args:
        path: A run of whence, a training output folder of ``diffusers``, a checkpoint, a saved pipeline or model.
        data: Source of the training images. Needed for a foreign model; a run knows its own.
        data_settings: How they are read, or what is to be changed of how the run did it.
        out: Folder for scores and report of a foreign model.
        loss: Training loss of a foreign model. Default: mse, as in the training scripts of ``diffusers``.
        allow_pickle: Also read ``.bin`` weights.

    Returns:
        The run; nothing of the model is loaded yet.

    Raises:
        ConfigError: If something is missing or contradicts what is known.
    """
    folder = Path(path)
    if loss is not None:
        check_choice("loss", loss, LossName)
    if (folder / "config.yaml").exists():
        return _known_run(folder, data, data_settings, out, loss, allow_pickle)
    list_checkpoints(folder)  # raises, saying what is accepted
    recorded = _recorded_loss(folder)
    if data is None:
        raise ConfigError(f"{folder} does not say what it was trained on; give the training images with --data.")
    if out is None and recorded is None:
        raise ConfigError(
            f"{folder} was not made by whence, so it is left as it is; say with --out where scores shall go."
        )
    if recorded and loss and loss != recorded:
        raise ConfigError(f"{folder} was trained with the loss {recorded}, by its record; leave --loss out.")
    run = Run(
        Path(out) if out else folder,
        data,
        _changed(DataSettings(), data_settings),
        folder,
        recorded or loss or "mse",
        allow_pickle,
    )
    _check_config(run)
    _write_config(run)
    return run


def train_run(
    folder: str | Path,
    data: str,
    *,
    data_settings: DataSettings | None = None,
    model_settings: ModelSettings | None = None,
    settings: TrainingSettings | None = None,
    device: str = "cpu",
    show_progress: bool = True,
) -> Run:
    """Train a model with a record, or go on with an interrupted training.

    Args:
        folder: The run.
        data: Source of the training images.
        data_settings: How they are read.
        model_settings: Architecture and noise schedule.
        settings: Optimizer, schedule, length, seed.
        device: Torch device.
        show_progress: Show a progress bar.

    Returns:
        The run, ready to be traced.
    """
    settings = settings or TrainingSettings()
    run = Run(Path(folder), data, data_settings or DataSettings(), Path(folder), settings.loss)
    images = run.train_images  # opened first, so that nothing is written where the images are at fault
    _check_config(run)
    train(
        run.folder,
        images,
        model_settings or ModelSettings(),
        settings,
        device=device,
        show_progress=show_progress,
        # Only now is it known that the settings can be met, and are those of a record that is there already.
        on_start=lambda: _write_config(run),
    )
    return run


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


def _known_run(
    folder: Path,
    data: str | None,
    data_settings: DataSettings | Mapping[str, Any] | None,
    out: str | Path | None,
    loss: LossName | None,
    allow_pickle: bool,
) -> Run:
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text())
        found = config["format_version"]
        model = folder / config["model"]
        known = Run(folder, config["data"]["source"], DataSettings(**config["data"]["settings"]), model, config["loss"])
    except (OSError, ValueError, yaml.YAMLError, TypeError, KeyError) as error:
        raise ConfigError(f"{folder / 'config.yaml'} is not a configuration of whence: {error!r}.") from error
    if found != FORMAT_VERSION:
        raise ConfigError(f"{folder / 'config.yaml'} has format version {found}; this whence reads {FORMAT_VERSION}.")
    trained_with = _recorded_loss(model) or known.loss
    if trained_with != (loss or known.loss) or trained_with != known.loss:
        asked = f"--loss {loss}" if loss else f"config.yaml says {known.loss}, which"
        raise ConfigError(f"{folder} was trained with the loss {trained_with}; {asked} contradicts it. Leave it out.")
    run = replace(
        known,
        folder=Path(out) if out else folder,
        data_source=data or known.data_source,
        data_settings=_changed(known.data_settings, data_settings),
        allow_pickle=allow_pickle,
    )
    if run.folder != folder:
        _check_config(run)
        _write_config(run)
    return run


def _recorded_loss(model: Path) -> LossName | None:
    """Read the loss off a model's record, if there is one."""
    folder = model / "record"
    return read_manifest(folder)["loss"] if (folder / "manifest.json").exists() else None


def _config_of(run: Run) -> dict[str, Any]:
    """Give the content of config.yaml, the same for the same settings."""
    return {
        "format_version": FORMAT_VERSION,
        "whence": version("whence"),
        "model": "." if run.model == run.folder else str(run.model.resolve()),
        "data": {"source": _absolute(run.data_source), "settings": asdict(run.data_settings)},
        "loss": run.loss,
    }


def _check_config(run: Run) -> None:
    """Refuse to make something else of a folder that is a run already."""
    path = run.folder / "config.yaml"
    if not path.exists():
        return
    try:
        found = dict(yaml.safe_load(path.read_text()))
        found = {"model": found["model"], "loss": found["loss"], **found["data"]["settings"]}
    except (OSError, ValueError, yaml.YAMLError, TypeError, KeyError) as error:
        raise ConfigError(
            f"{path} is not a configuration of whence. Choose another folder; it is left as it is."
        ) from error
    config = _config_of(run)
    # Not the source: images may be moved, and a record's fingerprint tells whether they are the same.
    want = {"model": config["model"], "loss": config["loss"], **config["data"]["settings"]}
    differences = [f"{k} is {found.get(k)!r}, not {v!r}" for k, v in want.items() if found.get(k) != v]
    if differences:
        raise ConfigError(
            f"{run.folder} is another run: {'; '.join(differences)}. Choose another folder; it is left as it is."
        )


def _changed(settings: DataSettings, changes: DataSettings | Mapping[str, Any] | None) -> DataSettings:
    if changes is None or isinstance(changes, DataSettings):
        return changes or settings
    return replace(settings, **changes)


def _write_config(run: Run) -> None:
    with publish_file(run.folder / "config.yaml") as partial:
        partial.write_text(yaml.safe_dump(_config_of(run), sort_keys=False))


def _declared(methods: Methods) -> list[Method | Baseline]:
    asked = [methods] if isinstance(methods, str | Method | Baseline) else methods
    declared = [method_by_name(m) if isinstance(m, str) else m for m in asked]
    retrained = [m.name for m in declared if isinstance(m, RetrainingMethod)]
    if retrained:
        raise ConfigError(
            f"{', '.join(retrained)} cannot be traced: retrained models make it. Use `whence retrain`, then `whence "
            "evaluate` with --fit-subsets."
        )
    return [m for m in declared if not isinstance(m, RetrainingMethod)]


def _tuples(value: Any) -> Any:
    """Bring a setting that was kept as JSON back to its type."""
    return tuple(value) if isinstance(value, list) else value


def _sources(queries: Images) -> list[str | None]:
    """Name the sources of queries, None where they were given as opened images."""
    return [None if isinstance(p, ImageData) else _absolute(p) for p in _parts(queries)]


def _parts(queries: Images) -> list[str | Path | ImageData]:
    return [queries] if isinstance(queries, str | Path | ImageData) else list(queries)


def _absolute(source: str | Path) -> str:
    """Make a path findable from anywhere; names of images that come with whence stay."""
    return str(source) if str(source) in BUNDLED else str(Path(source).resolve())
