"""Which training images made this one? Data attribution for diffusion models, on Hugging Face ``diffusers``.

The names below load what they need when they are first used, so that pages and notebooks open scores without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from whence.config import CleaningSettings as CleaningSettings
    from whence.config import CounterfactualSettings as CounterfactualSettings
    from whence.config import DataSettings as DataSettings
    from whence.config import EvaluationSettings as EvaluationSettings
    from whence.config import IndexSettings as IndexSettings
    from whence.config import ModelSettings as ModelSettings
    from whence.config import QuerySettings as QuerySettings
    from whence.config import RetrainingSettings as RetrainingSettings
    from whence.config import SamplingSettings as SamplingSettings
    from whence.config import TraceSettings as TraceSettings
    from whence.config import TrainingSettings as TrainingSettings
    from whence.data import ImageData as ImageData
    from whence.data import open_images as open_images
    from whence.ensembles import ensemble as ensemble
    from whence.ground_truth import GroundTruth as GroundTruth
    from whence.methods import GradientPlan as GradientPlan
    from whence.methods import Grid as Grid
    from whence.methods import Method as Method
    from whence.methods import Replay as Replay
    from whence.opening import open_run as open_run
    from whence.opening import train_run as train_run
    from whence.pipeline import Run as Run
    from whence.pipeline import events as events
    from whence.record import Record as Record
    from whence.recorder import Recorder as Recorder
    from whence.scores import Scores as Scores
    from whence.store import Store as Store

_HOME = {
    "CleaningSettings": "whence.config",
    "CounterfactualSettings": "whence.config",
    "DataSettings": "whence.config",
    "EvaluationSettings": "whence.config",
    "IndexSettings": "whence.config",
    "ModelSettings": "whence.config",
    "QuerySettings": "whence.config",
    "RetrainingSettings": "whence.config",
    "SamplingSettings": "whence.config",
    "TraceSettings": "whence.config",
    "TrainingSettings": "whence.config",
    "ImageData": "whence.data",
    "open_images": "whence.data",
    "ensemble": "whence.ensembles",
    "GroundTruth": "whence.ground_truth",
    "GradientPlan": "whence.methods",
    "Grid": "whence.methods",
    "Method": "whence.methods",
    "Replay": "whence.methods",
    "Run": "whence.pipeline",
    "events": "whence.pipeline",
    "open_run": "whence.opening",
    "train_run": "whence.opening",
    "Record": "whence.record",
    "Recorder": "whence.recorder",
    "Scores": "whence.scores",
    "Store": "whence.store",
}

__all__ = list(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'whence' has no attribute {name!r}; it has {', '.join(_HOME)}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
