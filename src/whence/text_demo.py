"""The text demo: a small text-to-image model, what it drew for some prompts, and the training images that came from.

Everyday things are drawn in four known styles, and a caption says both: "cat face, noto style". So it is known which
training images could be credited for a query: those of its style, and those of its name. Some pairs of name and style
are held out of training: their pictures are queries, beside those that the model draws for prompts.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool
from numpy import ndarray

from whence._files import write_json
from whence.config import DataSettings, IndexSettings, LossName, ModelSettings, TraceSettings, TrainingSettings
from whence.data import ImageData
from whence.demo import claim_folder
from whence.errors import DataError
from whence.evaluation import precision
from whence.opening import train_run
from whence.pipeline import Run
from whence.retrieval import CHANCE
from whence.scores import Scores

TRAIN, HELD_OUT = "demo-styles", "demo-styles-queries"
DATA = DataSettings(resolution=16)
MODEL = ModelSettings(
    widths=(32, 64, 96),
    beta_schedule="squaredcos_cap_v2",
    prediction_type="v_prediction",
    condition="words",
    caption_words=8,
)
TRACE = TraceSettings(timesteps=10, draws=4)
METHODS = ("tracin", "retrac", "grad-cos", "pixels", "random")
INDEX = IndexSettings(grid=True, checkpoints="last", output="squares")
"""The store that STORED_METHODS need."""
STORED_METHODS = ("d-trak",)
PROMPTS = (
    "hamburger, twemoji style",
    "red heart, fluent style",
    "panda, noto style",
    "sunflower, fluent style",
    "rocket, twemoji style",
    "frog, openmoji style",
    "cat face, twemoji style",
    "balloon, noto style",
    # Training never saw these pairs of name and style.
    "cat face, noto style",
    "red apple, fluent style",
    "tulip, openmoji style",
    "carrot, twemoji style",
)
BEST = "best possible"
"""Name of the row of a ranking that puts first all that it should."""


def training_settings(loss: LossName, seed: int, *, epochs: int = 220) -> TrainingSettings:
    """Give the demo's training settings."""
    return TrainingSettings(epochs=epochs, batch_size=16, checkpoints=4, learning_rate=2e-3, loss=loss, seed=seed)


def run_text_demo(
    folder: Path,
    *,
    fresh: bool = False,
    seed: int = 0,
    loss: LossName = "mse",
    show_progress: bool = True,
) -> tuple[Run, Path, dict[str, Any]]:
    """Train, draw pictures for prompts, trace them and write the report; what is there already is used again.

    Args:
        folder: Where the run goes.
        fresh: Remove an earlier demo first.
        seed: Seed of training.
        loss: Training loss.
        show_progress: Show progress bars.

    Returns:
        The run, the page, and the table of what was measured.

    Raises:
        ConfigError: If ``fresh`` would remove something that is not a demo, or the folder holds something else.
    """
    claim_folder(folder, fresh=fresh)
    run = train_run(
        folder,
        TRAIN,
        data_settings=DATA,
        model_settings=MODEL,
        settings=training_settings(loss, seed),
        show_progress=show_progress,
    )
    drawn = run.sample(1, prompts=PROMPTS, show_progress=show_progress)
    scores = score(run, [drawn, HELD_OUT], show_progress=show_progress)
    queries = run.open_queries([drawn, HELD_OUT])
    table = factor_table(scores, run.train_images, queries)
    table["notes"].append(
        f"The model saw images of {DATA.resolution} x {DATA.resolution} pixels. The first {len(PROMPTS)} queries were "
        "drawn by it for the prompt that is their title; the others are pictures that it has never seen. "
        f"TracIn and ReTrac took each at {TRACE.timesteps} timesteps x {TRACE.draws} draws; the default of whence "
        "trace is 100 x 16."
    )
    page = run.report(scores=scores, queries=queries, summary=table)
    write_json(folder / "evaluation" / "factors.json", table)
    return run, page, table


def score(run: Run, queries: Sequence[str | Path], *, show_progress: bool = True) -> list[Scores]:
    """Score queries by the demo's methods, those that need a store first.

    Args:
        run: A trained model.
        queries: Sources of the queries.
        show_progress: Show progress bars.

    Returns:
        Scores of each method.
    """
    store = run.index(INDEX, show_progress=show_progress)
    stored = run.query(queries, STORED_METHODS, store=store, show_progress=show_progress)
    traced = run.trace(queries, METHODS, TRACE, show_progress=show_progress)
    return [one for one in (*stored.values(), *traced.values()) if isinstance(one, Scores)]


def read_caption(caption: str) -> tuple[str, str]:
    """Split a caption of the text demo.

    Args:
        caption: Such as "cat face, noto style".

    Returns:
        Name and style: "cat face", "noto".

    Raises:
        DataError: If it is not of this form.
    """
    name, comma, rest = caption.rpartition(", ")
    style, _, last = rest.rpartition(" ")
    if not (name and comma and style and last == "style"):
        raise DataError(f"A caption of the text demo reads 'name, STYLE style'; found {caption!r}.")
    return name, style


def factors_of(train: ImageData, queries: ImageData) -> dict[str, Bool[ndarray, "query train"]]:
    """Say which training images share a query's known factors, by their captions.

    Args:
        train: Training images with captions of the text demo.
        queries: Queries with such captions.

    Returns:
        A mask for ``style`` and one for ``name``.

    Raises:
        DataError: If captions are missing or of another form.
    """
    of_train, of_query = (
        np.array([read_caption(caption) for caption in images.captions or [""]]) for images in (train, queries)
    )
    return {factor: of_query[:, None, k] == of_train[None, :, k] for factor, k in (("style", 1), ("name", 0))}


def factor_table(scores: Sequence[Scores], train: ImageData, queries: ImageData, k: int = 10) -> dict[str, Any]:
    """Measure how many of the strongest training images share a query's style and its name.

    Args:
        scores: One per method, for these images.
        train: Training images with captions of the text demo.
        queries: Queries with such captions; those labelled ``generated`` are measured apart.
        k: Length of a ranking.

    Returns:
        ``columns``, ``rows`` (the last two are chance and the best possible), ``caption`` and ``notes``.

    Raises:
        DataError: If captions are missing or of another form.
    """
    factors = factors_of(train, queries)
    drawn = np.array([label == "generated" for label in queries.labels or [""] * len(queries)])
    groups = {name: mask for name, mask in (("drawn", drawn), ("held out", ~drawn)) if mask.any()}
    rows: list[list[Any]] = [[one.method] for one in scores] + [[CHANCE], [BEST]]
    columns = ["method"]
    for group, mask in groups.items():
        for factor, members in factors.items():
            columns.append(f"{factor}@{k}, {group}")
            shares = [precision(one.top_rows(k), members)[mask].mean() for one in scores]
            counts = members[mask].sum(axis=1)
            shares += [(counts / len(train)).mean(), (np.minimum(counts, k) / k).mean()]
            for row, share in zip(rows, shares, strict=True):
                row.append(round(float(share), 3))
    counted = " and ".join(f"{int(mask.sum())} {name}" for name, mask in groups.items())
    return {
        "columns": columns,
        "rows": rows,
        "caption": f"Rankings of {len(train)} training images for {counted} queries.",
        "notes": [
            f"style@{k}: share of the top {k} that has the query's style; name@{k}: its name. drawn: pictures that the "
            "model made for a prompt; held out: pictures of pairs of name and style that training never saw.",
            f"{CHANCE}: the expectation of random scores. {BEST}: all of the style, or of the name, first; of a name "
            "there are at most four pictures in training.",
        ],
    }
