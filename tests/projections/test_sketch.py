import math

import pytest
import torch
from torch import Tensor

from projections.contract import Gradients, ProjectionContract, project, sketch_variance
from projections.test_spans import cores_variance
from whence.projections import make_projection, sketch
from whence.projections._random import signs, table_key, uniforms


class TestSketch(ProjectionContract):
    kind = "sketch"
    golden = [-89.0, -57.0, -284.0]

    def expected_variance(self, gradients: Gradients) -> Tensor:
        return sketch_variance([values.reshape(2, -1) for values in gradients.values()], 16)


class TestTwoSidedSketch(ProjectionContract):
    kind = "two_sided_sketch"
    width = 7
    num_seeds = 1500
    golden = [14.224028949387332, -216.86530926549517, -260.1512085165923]

    def expected_variance(self, gradients: Gradients) -> Tensor:
        """The variance of what is sketched, and the mean of the sketch's own: the law of total variance."""
        sketched = []
        for seed in range(200):
            left = {}
            for name, values in gradients.items():
                sides = self.make(seed=seed).sides(name)
                left[name] = values if sides is None else sides.core(values)
            sketched.append(sketch_variance([values.reshape(2, -1) for values in left.values()], self.width))
        return cores_variance(gradients) + torch.stack(sketched).mean(0)


def one_number_at_a_time(values: Tensor, name: str, seed: int, width: int) -> Tensor:
    count = values.shape[1]
    negate = signs(table_key(seed, "signs", name), count)
    shifts = uniforms(table_key(seed, "shifts", name), math.ceil(count / width))
    rows = torch.zeros(len(values), width, dtype=values.dtype)
    for number in range(count):
        fold, place = divmod(number, width)
        rows[:, (place + int(shifts[fold] * width)) % width] += negate[number] * values[:, number]
    return rows


@pytest.mark.parametrize("gathered", [False, True], ids=["in turn", "gathered"])
@pytest.mark.parametrize(("count", "width"), [(1, 1), (5, 1), (5, 8), (8, 8), (100, 8), (96, 8), (7, 64)])
def test_folds_against_one_number_at_a_time(monkeypatch: pytest.MonkeyPatch, count: int, width: int, gathered: bool):
    if gathered:
        monkeypatch.setitem(sketch._FOLDS_IN_TURN, "cpu", 0)  # noqa: SLF001
        monkeypatch.setattr(sketch, "_GATHERED_AT_ONCE", 3 * 8 * 5)  # five folds of three units
    values = torch.randn(3, count, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for seed in range(3):
        projection = make_projection("sketch", {"a": (count,)}, width=width, seed=seed, dtype=torch.float64)
        torch.testing.assert_close(project(projection, {"a": values}), one_number_at_a_time(values, "a", seed, width))


def test_one_fold_is_exact():
    values = torch.randn(4, 100, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rows = project(make_projection("sketch", {"a": (100,)}, width=128, seed=0, dtype=torch.float64), {"a": values})
    torch.testing.assert_close(rows @ rows.T, values @ values.T)
