"""What a run is asked, as callers write it: images by their sources, methods by their names."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union

from whence.data import ImageData
from whence.errors import ConfigError
from whence.methods import Baseline, Method, RetrainingMethod, method_by_name

BUNDLED = ("demo", "demo-queries", "demo-styles", "demo-styles-queries")
"""Sources that come with whence."""

Images = Union[str, Path, ImageData, "Queries", Sequence[str | Path | ImageData]]
"""Where images come from: a source, opened images, several of these, or queries with a region or prompts."""

Methods = str | Method | Baseline | Sequence[str | Method | Baseline]
"""Methods by name, or declarations of one's own."""


@dataclass(frozen=True)
class Queries:
    """Query images of which more is said than where they are."""

    images: Sequence[str | Path | ImageData]
    mask: str | Path | None = None
    """Which part of them counts: one mask for all, or a folder with one for each; see :mod:`whence.regions`."""
    prompts: Sequence[str] = ()
    """Their captions (labels, of a model that is told these) in the order of the images, one for each or one for all,
    instead of what comes with them."""

    def told(self) -> dict[str, Any]:
        """Give what is said beside the images, as JSON can hold it."""
        return {"mask": None if self.mask is None else absolute(self.mask), "prompts": list(self.prompts)}


def parts(queries: Images) -> list[str | Path | ImageData]:
    """List the sources and opened images, also where there is one."""
    if isinstance(queries, Queries):
        return list(queries.images)
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
