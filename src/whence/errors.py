"""Every error that whence raises on purpose.

A message says what must hold, what was found and what to do. The command line prints it without a traceback.
"""

from typing import Any, get_args


class WhenceError(Exception):
    """Base of all errors that whence raises on purpose."""


class ConfigError(WhenceError):
    """A setting is unknown, contradictory, or without effect where it matters."""


class DataError(WhenceError):
    """An image, a data set or a list of sample ids cannot be used as it is."""


class RecordError(WhenceError):
    """A record of training is missing, damaged, or does not belong to what it is used with."""


class CheckpointError(WhenceError):
    """A checkpoint folder is missing, damaged, or of another architecture."""


class StoreError(WhenceError):
    """A store of gradient rows is missing, damaged, of another specification, or given what it cannot hold."""


class ScoresError(WhenceError):
    """A file of scores is missing, damaged, or used for what it does not hold."""


class GroundTruthError(WhenceError):
    """A ground truth of retrained models is missing, damaged, or used for what it cannot tell."""


class RetrainingError(WhenceError):
    """A model could not be trained again, or what was left behind is no model."""


class UnsupportedModelError(WhenceError):
    """A model has parameters or layers whose per-sample gradients cannot be taken."""


class NumericsError(WhenceError):
    """A loss, gradient or weight is not finite."""


class InUseError(WhenceError):
    """Another process is writing to the same run."""


def check_choice(what: str, value: Any, choices: Any) -> None:
    """Refuse a value that is not one of a ``Literal``'s, so that no name falls through to another's meaning.

    Raises:
        ConfigError: The message lists the known values.
    """
    known = get_args(choices)
    if value not in known:
        raise ConfigError(f"Unknown {what} {value!r}; known are {', '.join(map(str, known))}.")
