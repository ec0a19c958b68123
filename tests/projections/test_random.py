import numpy as np
import pytest

from whence.projections._random import normals, signs, table_key, uniforms

KEY = table_key(3, "signs", "conv_in.weight")


def test_golden_values():
    assert KEY == 13105168994312420710
    assert signs(KEY, 8).tolist() == [1, -1, 1, -1, 1, 1, -1, 1]
    np.testing.assert_allclose(uniforms(KEY, 2), [0.18115955897516367, 0.14926424578261732], rtol=1e-15)
    np.testing.assert_allclose(
        normals(KEY, 3), [0.37398411602339104, 0.509772451774081, -0.9473315534458758], rtol=1e-13
    )


@pytest.mark.parametrize("draw", [signs, uniforms, normals])
def test_a_longer_table_begins_with_a_shorter_one(draw):
    for count in (0, 1, 63, 64, 65):
        assert np.array_equal(draw(KEY, 100)[:count], draw(KEY, count))


@pytest.mark.parametrize(
    "other", [(4, "signs", "conv_in.weight"), (3, "shifts", "conv_in.weight"), (3, "signs", "conv_in.bias")]
)
def test_every_part_of_a_key_counts(other: tuple[int, str, str]):
    assert table_key(*other) != KEY


@pytest.mark.parametrize(("draw", "mean", "fourth"), [(signs, 0, 1), (uniforms, 0.5, 1 / 80), (normals, 0, 3)])
def test_moments(draw, mean: float, fourth: float):
    draws = draw(KEY, 100_000) - mean
    # About four standard errors of the widest, the normals.
    assert abs(draws.mean()) < 0.013
    assert (draws**4).mean() == pytest.approx(fourth, rel=0.05)
