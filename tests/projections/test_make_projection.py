import inspect

import pytest
import torch

from whence.errors import ConfigError
from whence.projections import canonical_name, make_projection

SHAPES = {"conv.weight": (2, 3), "conv.bias": (2,)}


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("conv.weight", "conv.weight"),
        ("module.conv.weight", "conv.weight"),
        ("module._orig_mod.base_model.conv.weight", "conv.weight"),
        ("unet._orig_mod.conv.weight", "unet.conv.weight"),
        ("my_module.conv.weight", "my_module.conv.weight"),
        ("module", "module"),
    ],
)
def test_canonical_name(name: str, canonical: str):
    assert canonical_name(name) == canonical


def test_refuses_an_unknown_kind():
    untyped = inspect.unwrap(make_projection)  # the tests' type checks would refuse it first
    with pytest.raises(ConfigError, match="Unknown projection kind 'dense'; known are two_sided_sketch, two_sided, sk"):
        untyped("dense", SHAPES, width=8, seed=0)


@pytest.mark.parametrize("kind", ["two_sided_sketch", "sketch", "gaussian", "rademacher"])
def test_refuses_a_missing_width(kind: str):
    with pytest.raises(ConfigError, match=f"'{kind}' needs a width; found none"):
        make_projection(kind, SHAPES, seed=0)


@pytest.mark.parametrize("kind", ["identity", "two_sided"])
def test_refuses_a_width_that_does_not_follow(kind: str):
    with pytest.raises(ConfigError, match=f"'{kind}' follows from the parameters and is 8; found 9"):
        make_projection(kind, SHAPES, width=9, seed=0)


@pytest.mark.parametrize("what", ["width", "side"])
def test_refuses_a_size_below_one(what: str):
    with pytest.raises(ConfigError, match=f"The {what} of a projection must be at least 1; found 0"):
        make_projection("two_sided_sketch", SHAPES, seed=0, **{"width": 8, what: 0})


def test_refuses_unknown_direct_parameters():
    with pytest.raises(ConfigError, match="among the shapes; these are not: time.bias, time.weight"):
        make_projection("two_sided", SHAPES, seed=0, direct=["time.weight", "conv.bias", "time.bias"])


def test_refuses_names_that_differ_by_wrappers():
    with pytest.raises(ConfigError, match="more than one parameter is called a.weight"):
        make_projection("identity", {"a.weight": (2,), "a.module.weight": (2,), "b": (1,)}, seed=0)


def test_takes_a_torch_size():
    projection = make_projection("identity", {"a": torch.zeros(2, 3).shape}, seed=0)
    assert projection.width == 6


def test_small_matrices_are_left_whole_before_a_sketch():
    shapes = {"small": (64, 512), "large": (64, 513)}  # 32 cores of 32 x 32, and some more
    sketch = make_projection("two_sided_sketch", shapes, width=8, seed=0)
    assert sketch.sides("small") is None and sketch.sides("large") is not None
    assert make_projection("two_sided_sketch", shapes, width=8, whole=0, seed=0).sides("small") is not None
    assert make_projection("two_sided", shapes, seed=0).sides("small") is not None
