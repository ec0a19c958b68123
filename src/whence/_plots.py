"""The plots of the report as inline SVG, drawn by hand so that a page needs no plotting library.

Every plot is one ``<svg>`` whose colours and text sizes come from the page's style sheet through class names: ``all``
(every training image), ``top`` (those in a top k), ``band`` and ``median`` (queries), ``curve`` (one of many lines),
``axis``, ``grid``. They draw what they are given and compute nothing but bins, medians, quartiles and tick marks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from markupsafe import Markup
from numpy import ndarray

from whence._page_text import superscript

_Ticks = dict[float, str]  # value -> label

MAX_DOTS = 1500
"""More dots than this in one colour are thinned out evenly by row."""

_WIDTH, _HEIGHT = 480, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 22, 30, 48


@dataclass(frozen=True)
class _Axes:
    """Maps data to the drawing; ``y_range`` holds powers of ten where ``log_y``."""

    x_range: tuple[float, float]
    y_range: tuple[float, float]
    log_y: bool = False

    def x(self, values: ndarray) -> ndarray:
        low, high = self.x_range
        return _LEFT + (np.asarray(values, dtype=np.float64) - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, values: ndarray) -> ndarray:
        low, high = self.y_range
        heights = np.log10(values) if self.log_y else np.asarray(values, dtype=np.float64)
        return _HEIGHT - _BOTTOM - (np.clip(heights, low, high) - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    def frame(self, x_ticks: _Ticks, y_ticks: _Ticks, x_label: str, y_label: str) -> Markup:
        """Draw grid lines, tick labels and axis labels; the y label stands above its axis, where it reads level."""
        right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
        grid = Markup('<path class="grid" d="M{} {:.1f}H{}"/><text x="{}" y="{:.1f}" text-anchor="end">{}</text>')
        tick = Markup(
            '<path class="axis" d="M{0:.1f} {1}v4"/><text x="{0:.1f}" y="{2}" text-anchor="middle">{3}</text>'
        )
        heights, places = (where(np.array(list(ticks))) for where, ticks in ((self.y, y_ticks), (self.x, x_ticks)))
        parts = [
            *(
                grid.format(_LEFT, height, right, _LEFT - 8, height + 4, text)
                for height, text in zip(heights, y_ticks.values(), strict=True)
            ),
            *(
                tick.format(place, bottom, bottom + 18, text)
                for place, text in zip(places, x_ticks.values(), strict=True)
            ),
            Markup('<path class="axis" d="M{} {}H{}"/>').format(_LEFT, bottom, right),
            Markup('<text x="0" y="14">{}</text>').format(y_label),
            Markup('<text x="{}" y="{}" text-anchor="end">{}</text>').format(right, _HEIGHT - 8, x_label),
        ]
        return Markup("").join(parts)


def draw_norms(
    train_timesteps: Int[ndarray, " train"],
    train_norms: Float[ndarray, " train"],
    in_top: Bool[ndarray, " train"],
    query_timesteps: Int[ndarray, " timestep"],
    query_norms: Float[ndarray, "curve timestep"],
    *,
    name: str,
) -> Markup | None:
    """Plot gradient norms against timesteps: one dot a training image, a band for the queries.

    Args:
        train_timesteps: Timestep at which each sample was trained; below 0: leave it out.
        train_norms: Its gradient norm; NaN or 0: leave it out.
        in_top: True where the sample is in the top k of some query.
        query_timesteps: The query grid; may be empty.
        query_norms: Norms on the grid, one curve for each query and checkpoint.
        name: Whose plot it is, for readers that do not see it.

    Returns:
        An SVG; None where nothing can be drawn.
    """
    drawable = drawable_norms(train_timesteps, train_norms)
    query_norms = np.where(np.isfinite(query_norms) & (query_norms > 0), query_norms, np.nan)
    covered = ~np.isnan(query_norms).all(axis=0)
    quartiles = (
        np.nanquantile(query_norms[:, covered], [0.25, 0.5, 0.75], axis=0) if covered.any() else np.empty((3, 0))
    )
    grid = query_timesteps[covered]
    heights = np.concatenate([train_norms[drawable], quartiles.ravel()]).astype(np.float64)
    if not heights.size:
        return None
    last = float(np.concatenate([train_timesteps[drawable], query_timesteps]).max())
    axes, frame = _axes_of_norms(last, heights)
    shapes = [frame]
    if grid.size:
        band = _points(axes, np.append(grid, grid[::-1]), np.append(quartiles[2], quartiles[0][::-1]))
        shapes.append(Markup('<path class="band" d="M{}Z"/>').format(band))
    shapes += _dots_of_images(axes, train_timesteps, train_norms, drawable, in_top)
    if grid.size:
        shapes.append(Markup('<path class="median" d="M{}"/>').format(_points(axes, grid, quartiles[1])))
    return _svg(shapes, f"{name}: gradient norm against timestep")


def drawable_norms(
    train_timesteps: Int[ndarray, " train"], train_norms: Float[ndarray, " train"]
) -> Bool[ndarray, " train"]:
    """Tell which samples have a timestep and a norm that a logarithmic axis can show."""
    return (train_timesteps >= 0) & np.isfinite(train_norms) & (train_norms > 0)


def draw_timesteps(
    all_timesteps: Int[ndarray, " train"], top_timesteps: Int[ndarray, " place"], *, name: str
) -> Markup:
    """Plot how trained timesteps are spread: all samples as bars, the places of the top k as a line.

    Args:
        all_timesteps: One for each sample that was trained; at least one.
        top_timesteps: One for each place in a top k.
        name: Whose plot it is, for readers that do not see it.

    Returns:
        An SVG, its heights in percent of all samples and of all places.
    """
    edges = np.linspace(0.0, _round_up(float(all_timesteps.max())), 21)
    all_counts, top_counts = (np.histogram(timesteps, edges)[0] for timesteps in (all_timesteps, top_timesteps))
    return draw_counts(edges, all_counts, top_counts, name=name)


def draw_counts(
    edges: Float[ndarray, " edge"], all_counts: Int[ndarray, " bin"], top_counts: Int[ndarray, " bin"], *, name: str
) -> Markup:
    """Plot a histogram of trained timesteps as :func:`draw_timesteps` does, from counts."""
    shares = [100 * counts / max(int(counts.sum()), 1) for counts in (all_counts, top_counts)]
    highest = max(float(np.max(shares)) * 1.08, 1.0)
    axes = _Axes((0.0, float(edges[-1])), (0.0, highest))
    y_ticks = {value: f"{text} %" for value, text in _linear_ticks(highest).items()}
    return _svg(
        [
            axes.frame(_linear_ticks(axes.x_range[1]), y_ticks, "trained timestep", "share"),
            Markup('<path class="bars all" d="{}"/>').format(_bars(axes, edges, shares[0], gap=1.5)),
            Markup('<path class="steps top" d="{}"/>').format(_outline(axes, edges, shares[1])),
        ],
        f"{name}: trained timesteps of all training images and of those in a top k",
    )


def draw_curves(
    timesteps: Float[ndarray, " timestep"],
    curves: Float[ndarray, "curve timestep"],
    marks: Float[ndarray, "mark xy"],
    *,
    until: float,
    name: str,
) -> Markup | None:
    """Plot gradient norms against timesteps, a line for each curve, the last one strong.

    Args:
        timesteps: Points of every curve.
        curves: Norms; NaN or 0: leave the point out.
        marks: Timestep and norm of dots.
        until: Where the axis of timesteps ends.
        name: What the plot shows, for readers that do not see it.

    Returns:
        An SVG; None where nothing can be drawn.
    """
    curves = np.where(np.isfinite(curves) & (curves > 0), curves, np.nan)
    marks = marks[np.isfinite(marks).all(axis=1) & (marks[:, 1] > 0)]
    heights = np.concatenate([curves[~np.isnan(curves)], marks[:, 1]])
    if not heights.size:
        return None
    axes, frame = _axes_of_norms(until, heights)
    shapes = [frame]
    for number, curve in enumerate(curves):
        drawn = ~np.isnan(curve)
        if drawn.any():
            kind = "median" if number == len(curves) - 1 else "curve"
            points = _points(axes, timesteps[drawn], curve[drawn])
            shapes.append(Markup('<path class="{}" d="M{}"/>').format(kind, points))
    shapes.append(_dots(axes, "top", marks[:, 0], marks[:, 1]))
    return _svg(shapes, name)


def draw_sizes(
    places: Float[ndarray, " train"],
    sizes: Float[ndarray, " train"],
    in_top: Bool[ndarray, " train"],
    *,
    x_label: str,
    name: str,
) -> Markup | None:
    """Plot sizes of scores against how images were trained, a dot an image, with the median of every tenth of them.

    Args:
        places: Norm or timestep of each image; NaN: leave it out.
        sizes: Mean |score| as a share of the query's strongest; 0: leave it out.
        in_top: True where the image is in the top k of some query.
        x_label: What ``places`` are.
        name: What the plot shows, for readers that do not see it.

    Returns:
        An SVG; None where nothing can be drawn.
    """
    drawn = np.isfinite(places) & np.isfinite(sizes) & (sizes > 0)
    if not drawn.any():
        return None
    places, sizes, in_top = places[drawn], sizes[drawn], in_top[drawn]
    low, high = _padded(sizes)
    left, right = float(places.min()), float(places.max())
    pad = 0.04 * (right - left) or 0.04 * right or 1.0
    axes = _Axes((max(left - pad, 0.0), right + pad), (low, high), log_y=True)
    x_ticks = _linear_ticks(axes.x_range[1], axes.x_range[0])
    shapes = [axes.frame(x_ticks, _log_ticks(low, high), x_label, "mean |score| / strongest, log scale")]
    shapes += _dots_of_images(axes, places, sizes, np.ones(len(places), dtype=bool), in_top)
    tenths = [part for part in np.array_split(np.argsort(places, kind="stable"), 10) if len(part)]
    medians = np.array([(np.median(places[part]), np.median(sizes[part])) for part in tenths])
    shapes.append(Markup('<path class="median" d="M{}"/>').format(_points(axes, medians[:, 0], medians[:, 1])))
    return _svg(shapes, name)


def draw_moves(ranks: Float[ndarray, "way sample"], labels: Sequence[str], num_train: int, *, name: str) -> Markup:
    """Plot mean ranks of samples that were moved, a line for each, first place on top; strong: their median.

    Args:
        ranks: From 1 to ``num_train``; ways from left to right.
        labels: What each way is.
        num_train: Number of training images; a dashed line marks what chance gives.
        name: What the plot shows, for readers that do not see it.

    Returns:
        An SVG.
    """
    axes = _Axes((-0.4, len(labels) - 0.6), (-float(num_train), -1.0))
    y_ticks = {-rank: f"{rank:,.0f}" for rank in (1.0, *_linear_ticks(float(num_train))) if rank}
    ways = np.arange(len(labels))
    shapes = [axes.frame({float(way): label for way, label in enumerate(labels)}, y_ticks, "", "mean rank")]
    chance = np.full(2, -(num_train + 1) / 2)
    shapes.append(Markup('<path class="chance" d="M{}"/>').format(_points(axes, np.array(axes.x_range), chance)))
    for of_sample in ranks.T:
        shapes.append(Markup('<path class="curve" d="M{}"/>').format(_points(axes, ways, -of_sample)))
    middle = np.median(ranks, axis=1)
    shapes.append(Markup('<path class="median" d="M{}"/>').format(_points(axes, ways, -middle)))
    return _svg([*shapes, _dots(axes, "top", ways, -middle)], name)


def draw_scores(all_scores: Float[ndarray, " pair"], top_scores: Float[ndarray, " place"], *, name: str) -> Markup:
    """Plot how scores are spread, on a logarithmic count axis so that the tails are seen and nothing is cut off.

    Args:
        all_scores: Scores in [-1, 1], each relative to the strongest one of its query.
        top_scores: Those among them that are in a top k.
        name: Whose plot it is, for readers that do not see it.

    Returns:
        An SVG.
    """
    edges = np.linspace(-1.0, 1.0, 62)
    counts = [np.histogram(scores, edges)[0] for scores in (all_scores, top_scores)]
    # A count of 1 is a bar, not a line on the axis: the axis starts below it.
    low, high = float(np.log10(0.6)), max(float(np.log10(counts[0].max() * 1.5)), 1.0)
    axes = _Axes((-1.0, 1.0), (low, high), log_y=True)
    x_ticks = {-1.0: "−1", -0.5: "−0.5", 0.0: "0", 0.5: "0.5", 1.0: "1"}
    return _svg(
        [
            axes.frame(x_ticks, _log_ticks(low, high), "score / strongest |score| of the query", "count, log scale"),
            *(
                Markup('<path class="bars {}" d="{}"/>').format(
                    kind, _bars(axes, edges, np.maximum(count, 1e-9), gap=1.0)
                )
                for kind, count in zip(("all", "top"), counts, strict=True)
            ),
        ],
        f"{name}: distribution of scores",
    )


def _svg(shapes: list[Markup], title: str) -> Markup:
    start = Markup('<svg class="plot" viewBox="0 0 {} {}" role="img" aria-label="{}">')
    return start.format(_WIDTH, _HEIGHT, title) + Markup("").join(shapes) + Markup("</svg>")


def _padded(heights: ndarray) -> tuple[float, float]:
    """Give the powers of ten of a logarithmic axis: some room at both ends, and no less than two thirds of a decade."""
    low, high = float(np.log10(heights.min())), float(np.log10(heights.max()))
    pad = max(0.08, (0.7 - (high - low)) / 2)
    return low - pad, high + pad


def _axes_of_norms(until: float, norms: ndarray) -> tuple[_Axes, Markup]:
    """Give axes of gradient norms against timesteps, and their frame."""
    low, high = _padded(norms)
    axes = _Axes((0.0, _round_up(until)), (low, high), log_y=True)
    ticks = _linear_ticks(axes.x_range[1]), _log_ticks(low, high)
    return axes, axes.frame(*ticks, "timestep", "gradient norm, log scale")


def _dots_of_images(axes: _Axes, x_values: ndarray, y_values: ndarray, drawn: ndarray, in_top: ndarray) -> list[Markup]:
    """Draw training images, those in a top k over the others."""
    shapes = []
    for kind, mask in (("all", drawn & ~in_top), ("top", drawn & in_top)):
        rows = _thin_out(np.flatnonzero(mask))
        shapes.append(_dots(axes, kind, x_values[rows], y_values[rows]))
    return shapes


def _dots(axes: _Axes, kind: str, x_values: ndarray, y_values: ndarray) -> Markup:
    dots = "".join(f"M{x:.1f} {y:.1f}h0" for x, y in zip(axes.x(x_values), axes.y(y_values), strict=True))
    return Markup('<path class="dots {}" d="{}"/>').format(kind, dots)


def _points(axes: _Axes, x_values: ndarray, y_values: ndarray) -> str:
    return "L".join(f"{x:.1f} {y:.1f}" for x, y in zip(axes.x(x_values), axes.y(y_values), strict=True))


def _bars(axes: _Axes, edges: ndarray, heights: ndarray, gap: float) -> str:
    bottom = _HEIGHT - _BOTTOM
    lefts, rights, tops = axes.x(edges[:-1]) + gap / 2, axes.x(edges[1:]) - gap / 2, axes.y(heights)
    return "".join(
        f"M{left:.1f} {bottom}V{top:.1f}H{right:.1f}V{bottom}Z"
        for left, right, top in zip(lefts, rights, tops, strict=True)
        if top < bottom
    )


def _outline(axes: _Axes, edges: ndarray, heights: ndarray) -> str:
    tops, rights = axes.y(heights), axes.x(edges[1:])
    return f"M{axes.x(edges)[0]:.1f} {tops[0]:.1f}" + "".join(
        f"V{top:.1f}H{right:.1f}" for top, right in zip(tops, rights, strict=True)
    )


def _thin_out(rows: ndarray) -> ndarray:
    """Take at most ``MAX_DOTS`` rows, evenly spaced, so that the same scores always give the same picture."""
    if len(rows) <= MAX_DOTS:
        return rows
    return rows[np.linspace(0, len(rows) - 1, MAX_DOTS).round().astype(int)]


def _round_up(value: float) -> float:
    """Round an upper end up to two digits: 999 to 1000. At least 1."""
    unit = 10.0 ** max(np.floor(np.log10(max(value, 1.0))) - 1, 0)
    return max(float(np.ceil(value / unit) * unit), 1.0)


def _linear_ticks(highest: float, lowest: float = 0.0) -> _Ticks:
    """Label round numbers from ``lowest`` to ``highest``: from zero, three to six."""
    span = highest - lowest
    unit = 10.0 ** np.floor(np.log10(span))
    step = next(size * unit for size in (0.1, 0.2, 0.25, 0.5, 1.0, 2.0, 2.5, 5.0) if span / (size * unit) <= 5)
    first = int(np.ceil(lowest / step - 1e-9)) * step  # no minus before a zero
    return {float(value): f"{value:g}" for value in np.arange(first, lowest + span * 1.0001, step)}


def _log_ticks(low: float, high: float) -> _Ticks:
    """Label powers of ten between two powers; also 2 and 5 times them where there are fewer than three."""
    for factors in ((1,), (1, 2, 5), tuple(range(1, 10))):
        ticks = [
            (factor, power)
            for power in range(int(np.floor(low)), int(np.ceil(high)) + 1)
            for factor in factors
            if low <= power + np.log10(factor) <= high
        ]
        if len(ticks) >= 3:
            break
    ticks = ticks[:: max(1, round(len(ticks) / 6))]
    return {factor * 10.0**power: _power_text(factor, power) for factor, power in ticks}


def _power_text(factor: int, power: int) -> str:
    if -3 <= power <= 4:
        return f"{factor * 10.0**power:,.{max(0, -power)}f}"
    text = f"10{superscript(power)}"
    return text if factor == 1 else f"{factor}×{text}"
