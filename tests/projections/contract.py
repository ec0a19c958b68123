"""What every kind of projection must keep."""

from functools import cache

import pytest
import torch
from torch import Tensor

from whence.errors import ConfigError
from whence.projections import AbstractProjection, ProjectionKind, make_projection

SIDE = 4
SHAPES = {
    "conv.weight": (6, 2, 2, 2),  # both sides shrink
    "linear.weight": (3, 5),  # the inner side shrinks
    "tall.weight": (9, 2),  # the outer side shrinks
    "small.weight": (2, 4),  # no side shrinks
    "time.weight": (7, 4),  # of rank one, longer than the largest core
    "conv.bias": (6,),
    "scale": (),
}
DIRECT = {"time.weight"}
NUM_NUMBERS = 48 + 15 + 18 + 8 + 28 + 6 + 1

Gradients = dict[str, Tensor]


def random_gradients(num_units: int = 2, dtype: torch.dtype = torch.float64) -> Gradients:
    """Gradients of units that resemble each other, so that no inner product is near 0."""
    source = torch.Generator().manual_seed(0)
    gradients = {}
    for name, shape in SHAPES.items():
        common = torch.randn(shape, generator=source, dtype=torch.float64)
        own = torch.randn(num_units, *shape, generator=source, dtype=torch.float64)
        gradients[name] = (common + 0.7 * own).to(dtype)
    return gradients


def project(projection: AbstractProjection, gradients: Gradients) -> Tensor:
    units = len(next(iter(gradients.values())))
    rows = torch.zeros(units, projection.width, dtype=projection.space.dtype, device=projection.space.device)
    for name, values in gradients.items():
        projection.add(rows, name, values)
    return rows


def flat(gradients: Gradients) -> Tensor:
    return torch.cat([values.flatten(1) if values.dim() > 1 else values[:, None] for values in gradients.values()], 1)


def check_variance(products: Tensor, mean: Tensor, variance: Tensor) -> None:
    """Compare a sample, one value a seed on the first axis, with the mean and variance it should have."""
    # Four standard errors of a mean, and of a variance, both measured.
    deviations = products - mean
    bound = 4 * deviations.std(0) / len(products) ** 0.5
    assert ((products.mean(0) - mean).abs() <= bound + 1e-12 * mean.abs()).all()
    bound = 4 * deviations.square().std(0) / len(products) ** 0.5
    assert (bound <= 0.4 * variance).all(), "too few seeds to tell a wrong formula from a right one"
    assert ((deviations.square().mean(0) - variance).abs() <= bound + 1e-24 * mean.square()).all()


class ProjectionContract:
    """A subclass names a kind and gives the variance of its inner products."""

    kind: ProjectionKind
    width: int | None = 16
    own_spans = False
    """Whether each parameter has a span of its own in the row."""
    golden: list[float]
    """First numbers of the row of gradients 1, 2, 3, ... under seed 0."""
    num_seeds = 800

    def make(self, shapes=SHAPES, seed: int = 0, dtype: torch.dtype = torch.float64, **settings) -> AbstractProjection:
        direct = [name for name in shapes if name.removeprefix("module.") in DIRECT]
        settings = {"width": self.width, "direct": direct, "side": SIDE} | settings
        return make_projection(self.kind, shapes, seed=seed, whole=0, dtype=dtype, **settings)

    def expected_variance(self, gradients: Gradients) -> Tensor:
        """Variance of the inner product of the rows of units 0 and 0, 0 and 1, 1 and 1."""
        raise NotImplementedError

    def test_mean_and_variance_of_inner_products(self):
        gradients = random_gradients()
        grams = []
        for seed in range(self.num_seeds):
            rows = project(self.make(seed=seed), gradients)
            grams.append((rows @ rows.T)[[0, 0, 1], [0, 1, 1]])
        whole = flat(gradients)
        mean = (whole @ whole.T)[[0, 0, 1], [0, 1, 1]]
        check_variance(torch.stack(grams), mean, self.expected_variance(gradients))

    def test_linear(self):
        x, y = random_gradients(3), random_gradients(6)
        y = {name: values[3:] for name, values in y.items()}
        projection = self.make()
        both = {name: 2 * x[name] - 3 * y[name] for name in x}
        want = 2 * project(projection, x) - 3 * project(projection, y)
        torch.testing.assert_close(project(projection, both), want, rtol=0, atol=1e-12 * float(want.abs().max()))

    def test_adds_to_what_is_there(self):
        projection = self.make()
        values = random_gradients()["conv.weight"]
        start = torch.full((2, projection.width), 3.0, dtype=torch.float64)
        rows = start.clone()
        projection.add(rows, "conv.weight", values)
        torch.testing.assert_close(rows - start, project(projection, {"conv.weight": values}))

    def test_open_rows_close_to_rows(self):
        projection, gradients = self.make(), random_gradients()
        opened = torch.zeros(2, projection.open_width, dtype=torch.float64)
        for name, values in gradients.items():
            projection.add(opened, name, values)
        rows = torch.full((2, projection.width), 3.0, dtype=torch.float64)
        projection.close(opened, rows)
        torch.testing.assert_close(rows - 3, project(projection, gradients))
        assert not opened.any()

    def test_units_do_not_mix(self):
        gradients = random_gradients(4)
        together = project(self.make(), gradients)
        for unit in range(4):
            alone = project(self.make(), {name: values[unit : unit + 1] for name, values in gradients.items()})
            torch.testing.assert_close(alone[0], together[unit])

    def test_golden_values(self):
        gradients, first = {}, 1
        for name, shape in SHAPES.items():
            count = torch.Size(shape).numel()
            gradients[name] = torch.arange(first, first + count, dtype=torch.float64).reshape(1, *shape)
            first += count
        row = project(self.make(), gradients)[0]
        torch.testing.assert_close(row[: len(self.golden)].tolist(), self.golden, rtol=1e-10, atol=0)

    def test_a_seed_is_a_projection(self):
        gradients = random_gradients()
        rows = project(self.make(seed=5), gradients)
        assert torch.equal(rows, project(self.make(seed=5), gradients))
        assert torch.equal(rows, project(self.make(seed=6), gradients)) == (self.kind == "identity")

    @pytest.mark.parametrize("order", ["reversed", "alone"])
    @pytest.mark.parametrize("name", SHAPES)
    def test_other_parameters_do_not_matter(self, name: str, order: str):
        shapes = dict(reversed(SHAPES.items())) if order == "reversed" else {name: SHAPES[name]}
        gradients = {name: random_gradients()[name]}
        want, found = project(self.make(), gradients), project(self.make(shapes), gradients)
        if self.own_spans:
            want, found = want[want != 0], found[found != 0]
        assert torch.equal(found, want)

    def test_wrappers_do_not_matter(self):
        gradients = random_gradients()
        wrapped = self.make({f"module.{name}": shape for name, shape in SHAPES.items()})
        want = project(self.make(), gradients)
        assert torch.equal(project(wrapped, gradients), want)
        assert torch.equal(project(wrapped, {f"_orig_mod.{n}": values for n, values in gradients.items()}), want)

    def test_float32_is_float64_rounded(self):
        want = project(self.make(), random_gradients())
        found = project(self.make(dtype=torch.float32), random_gradients(dtype=torch.float32))
        # Sums of some hundred products, each rounded to 6e-8.
        torch.testing.assert_close(found.double(), want, rtol=0, atol=1e-5 * float(want.abs().max()))

    def test_takes_half_precision(self):
        halves = random_gradients(dtype=torch.bfloat16)
        want = project(self.make(), {name: values.double() for name, values in halves.items()})
        found = project(self.make(dtype=torch.float32), halves)
        torch.testing.assert_close(found.double(), want, rtol=0, atol=1e-5 * float(want.abs().max()))

    def test_any_memory_layout(self):
        values = random_gradients()["conv.weight"]
        other = values.transpose(0, 2).contiguous().transpose(0, 2)
        projection = self.make()
        want = project(projection, {"conv.weight": values})
        torch.testing.assert_close(project(projection, {"conv.weight": other}), want)

    def test_no_units(self):
        projection = self.make()
        rows = project(projection, random_gradients(0))
        assert rows.shape == (0, projection.width)

    def test_nothing_gives_nothing(self):
        zeros = {name: torch.zeros_like(values) for name, values in random_gradients().items()}
        assert not project(self.make(), zeros).any()

    @pytest.mark.parametrize("name", SHAPES)
    def test_a_core_is_added_as_its_gradient(self, name: str):
        projection, values = self.make(), random_gradients()[name]
        sides = projection.sides(name)
        assert (sides is not None) == (
            self.kind.startswith("two_sided") and name in ("conv.weight", "linear.weight", "tall.weight")
        )
        if sides is None:
            with pytest.raises(ConfigError, match=rf"{name} has no sides .* Add its whole gradients"):
                projection.add_core(torch.zeros(2, projection.width), name, torch.zeros(2, 1, 1))
            return
        matrix = values.flatten(2)
        out = torch.eye(matrix.shape[1], dtype=torch.float64) if sides.out is None else sides.out
        inner = torch.eye(matrix.shape[2], dtype=torch.float64) if sides.inner is None else sides.inner
        assert (out.shape[1], inner.shape[1]) == (min(len(out), SIDE), min(len(inner), SIDE))
        rows = torch.zeros(2, projection.width, dtype=torch.float64)
        projection.add_core(rows, name, torch.einsum("ok,uoi,il->ukl", out, matrix, inner))
        torch.testing.assert_close(rows, project(projection, {name: values}))

    def test_refuses_an_unknown_parameter(self):
        projection = self.make()
        message = r"'conv_out.weight' is not among the 7 parameters of this projection \(conv.weight, linear.weight"
        with pytest.raises(ConfigError, match=message):
            projection.add(torch.zeros(2, projection.width), "conv_out.weight", torch.zeros(2, 3))
        with pytest.raises(ConfigError, match=message):
            projection.sides("conv_out.weight")

    def test_refuses_another_shape(self):
        projection = self.make()
        with pytest.raises(ConfigError, match=r"linear.weight must have the shape \(3, 5\) .* found \(5, 3\)"):
            projection.add(torch.zeros(2, projection.width), "linear.weight", torch.zeros(2, 5, 3))

    def test_refuses_rows_of_another_width(self):
        projection = self.make()
        wanted, found = rf"\(2, {projection.width}\)", rf"\(2, {projection.width + 1}\)"
        with pytest.raises(ConfigError, match=f"rows of 2 units must have the shape {wanted}; found {found}"):
            projection.add(torch.zeros(2, projection.width + 1), "conv.bias", torch.zeros(2, 6))

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_a_gpu_gives_the_same(self):
        width = self.width and 3  # narrow, so that there are many folds
        gradients = random_gradients(5)
        on_gpu = project(
            self.make(device="cuda", width=width), {name: values.cuda() for name, values in gradients.items()}
        )
        torch.testing.assert_close(on_gpu.cpu(), project(self.make(width=width), gradients))


@cache
def sketch_variance_matrix(counts: tuple[int, ...], width: int) -> Tensor:
    """Chance that two numbers meet in a sketch, for parameters of these lengths; 0 for a number and itself."""
    folds = torch.cat([torch.arange(count) // width + 1000 * k for k, count in enumerate(counts)])
    return (folds[:, None] != folds).double() / width


def sketch_variance(parts: list[Tensor], width: int) -> Tensor:
    """Variance of the products 00, 01, 11 under a sketch: the sum over pairs of numbers, one by one."""
    chance = sketch_variance_matrix(tuple(part.shape[1] for part in parts), width)
    whole = torch.cat(parts, dim=1)
    found = []
    for x, y in [(whole[0], whole[0]), (whole[0], whole[1]), (whole[1], whole[1])]:
        crossed = x[:, None] * y
        found.append((chance * (crossed + crossed.T).square()).sum() / 2)
    return torch.stack(found)
