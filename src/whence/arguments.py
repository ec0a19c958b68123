"""What a run is asked, as callers write it: images by their sources, methods by their names."""

from collections.abc import Sequence
from pathlib import Path

from whence.data import ImageData
from whence.errors import ConfigError
from whence.methods import Baseline, Method, RetrainingMethod, method_by_name

BUNDLED = ("demo", "demo-queries", "demo-styles", "demo-styles-queries")
"""Sources that come with whence."""

Images = str | Path | ImageData | Sequence[str | Path | ImageData]
"""Where images come from: a source, opened images, or several of these."""

Methods = str | Method | Baseline | Sequence[str | Method | Baseline]
"""Methods by name, or declarations of one's own."""


def parts(queries: Images) -> list[str | Path | ImageData]:
    """List the sources and opened images, also where there is one."""
    return [queries] if isinstance(queries, str | Path | ImageData) else list(queries)


def sources(queries: Images) -> list[str | None]:
    """Name the sources of queries, None where they were given as opened images."""
    return [None if isinstance(p, ImageData) else absolute(p) for p in parts(queries)]


def absolute(source: str | Path) -> str:
    """Make a path findable from anywhere; names of images that come with whence stay."""
    return str(source) if str(source) in BUNDLED else str(Path(source).resolve())


def declare(methods: Methods) -> list[Method | Baseline]:
    """Look up methods by name, and refuse those that cannot be traced."""
    asked = [methods] if isinstance(methods, str | Method | Baseline) else methods
    declared = [method_by_name(m) if isinstance(m, str) else m for m in asked]
    retrained = [m.name for m in declared if isinstance(m, RetrainingMethod)]
    if retrained:
        raise ConfigError(
            f"{', '.join(retrained)} cannot be traced: retrained models make it. Use `whence retrain`, then `whence "
            "evaluate` with --fit-subsets."
        )
    return [m for m in declared if not isinstance(m, RetrainingMethod)]
