"""What a run finds out about its scores and shows of them: models trained again, tables, a page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from whence._files import write_json
from whence._run_folder import RunFolder
from whence._run_scores import as_trace_settings, load_all
from whence.arguments import Images
from whence.comparison import compare, write_table
from whence.config import EvaluationSettings, RetrainingSettings
from whence.data import ImageData
from whence.diagnosis import diagnose, read_diagnosis
from whence.duplicates import NEAR_DISTANCE
from whence.errors import ConfigError
from whence.ground_truth import GroundTruth
from whence.lds import LdsResult
from whence.report import write_report
from whence.retraining import retrain
from whence.retrieval import detection_table, retrieval_table
from whence.scores import Scores
from whence.self_influence import SELF


@dataclass(frozen=True)
class RunEvaluation(RunFolder):
    """Stages that look at scores; :class:`~whence.pipeline.Run` adds those that make some."""

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
        settings: EvaluationSettings | None = None,
        **changes: Any,
    ) -> tuple[list[LdsResult], dict[str, Any]]:
        """Compare scores with retrained models; see :mod:`whence.lds`. Writes ``evaluation/lds.json`` and ``lds.md``.

        Args:
            ground_truth: Retrained models, or their folder.
            scores: Scores, or their folders. Default: all in ``scores/`` of this run that are of the same images and
                queries; what is left out is told in the notes.
            settings: Which output of the models, resamples, subsets to fit on.
            **changes: Single settings by name, as ``measure="elbo"``.

        Returns:
            One result for each method and set of queries, and the table of them; see :func:`whence.comparison.compare`.
        """
        settings = replace(settings or EvaluationSettings(), **changes)
        truth = ground_truth if isinstance(ground_truth, GroundTruth) else GroundTruth.load(ground_truth)
        return compare(truth, self.folder, None if scores is None else load_all(scores), settings)

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
        chosen = latest if scores is None else load_all(scores)
        table = retrieval_table(chosen, self.train_images, opened, planted, k, near_distance=near_distance, lds=lds)
        write_table(self.folder / "evaluation" / "rankings", table)
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
        found = [one for one in load_all(path.parent for path in paths) if one.query_ids == (SELF,)]
        table = detection_table(found, ids)
        write_table(self.folder / "evaluation" / "detection", table)
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
        return diagnose(
            self.subject,
            opened,
            scores,
            as_trace_settings(used),
            self.folder,
            samples=samples,
            count=count,
            timesteps=timesteps,
            k=k,
            show_progress=show_progress,
        )

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
