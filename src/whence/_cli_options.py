"""Options that commands share."""

from typing import Any

import tyro

from whence.config import DataSettings

Flat = tyro.conf.OmitArgPrefixes
"""Settings whose options carry no name before their own: ``--timesteps``, not ``--settings.timesteps``."""


def given(settings: DataSettings) -> dict[str, Any]:
    """Keep what differs from the defaults: the rest is as the run did it."""
    return {name: value for name, value in vars(settings).items() if value != getattr(DataSettings(), name)}
