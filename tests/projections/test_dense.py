import pytest
import torch
from torch import Tensor

from projections.contract import Gradients, ProjectionContract, flat, project, random_gradients
from whence.projections import dense


def dense_variance(gradients: Gradients, width: int) -> Tensor:
    x, y = flat(gradients)
    return torch.stack([x @ x * (y @ y) + (x @ y) ** 2 for x, y in [(x, x), (x, y), (y, y)]]) / width


class DenseContract(ProjectionContract):
    @pytest.mark.parametrize("cached", [0, 16 * 10])
    def test_the_cache_does_not_matter(self, monkeypatch: pytest.MonkeyPatch, cached: int):
        gradients = random_gradients()
        want = project(self.make(), gradients)
        monkeypatch.setattr(dense, "_CACHED_NUMBERS", cached)
        projection = self.make()
        assert torch.equal(project(projection, gradients), want)
        assert torch.equal(project(projection, gradients), want)

    def test_blocks_are_independent(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(dense, "_NUMBERS_PER_BLOCK", 64 * 10)
        projection = self.make({"a": (30,)}, width=64)
        matrix = project(projection, {"a": torch.eye(30, dtype=torch.float64)})
        assert len(matrix.unique(dim=0)) == 30


class TestGaussian(DenseContract):
    kind = "gaussian"
    golden = [-55.43659462504669, 92.29650346481671, -221.35458745065114]

    def expected_variance(self, gradients: Gradients) -> Tensor:
        return dense_variance(gradients, 16)


class TestRademacher(DenseContract):
    kind = "rademacher"
    golden = [-572.0, 15.0, -10.0]

    def expected_variance(self, gradients: Gradients) -> Tensor:
        x, y = flat(gradients).square()
        return dense_variance(gradients, 16) - 2 * torch.stack([x @ x, x @ y, y @ y]) / 16
