"""Noise is a pure function of its key, the same for ever: golden values, and the distribution they come from."""

from itertools import combinations

import numpy as np
import pytest

from whence.diffusion.noise import (
    drawn_flip,
    drawn_timestep,
    keyed_order,
    noise_key,
    normals,
    normals_of_keys,
    scalar_draws,
)

# Never to be changed: every record and every store in the world rests on these.
GOLDEN = [
    (
        (0, "record", "train", "a", 1, 0, 0),
        3253285048669015982,
        (685, True),
        [0.32702056, -0.8884398, 0.3208423, -0.30922663, 0.77161133],
    ),
    (
        (0, "grid", "query", "a", 1, 0, 0),
        1010481414124054875,
        (549, True),
        [-0.5607026, -0.21115284, 1.9841001, -0.15147851, -0.34661922],
    ),
    (
        (7, "record", "train", "img/1 2.png", 12, 3, 1),
        17235193886633575390,
        (818, True),
        [1.0539851, -0.112558104, 1.0763001, 0.14140826, -0.3173228],
    ),
    (
        (0, "record", "train", "", 1, 0, 0),
        6737483930362037755,
        (91, False),
        [1.3541888, -0.86562407, 0.11469289, 0.97327983, 1.3420004],
    ),
    (
        (0, "record", "train", "ü 猫\n", 1, 0, 0),
        2150502533865439127,
        (378, False),
        [-0.28826508, -1.1211176, 1.081484, -0.14995396, -0.055435665],
    ),
]
BASE = {"seed": 0, "stream": "record", "side": "train", "sample_id": "a", "position": 1, "draw": 0, "occurrence": 0}


@pytest.mark.parametrize("parts, key, scalars, values", GOLDEN)
def test_keys_and_draws_are_golden(parts, key, scalars, values):
    assert noise_key(*parts) == key
    assert (drawn_timestep(key, 1000), drawn_flip(key)) == scalars
    # One unit in the last place of float32: where the C library's log or sine differs in its own last bit.
    np.testing.assert_array_almost_equal_nulp(normals(key, (5,)), np.array(values, np.float32), nulp=1)


@pytest.mark.parametrize("key", [0, 2**64 - 1])
def test_raw_words_are_those_of_philox(key):
    words = {0: 213000021201967259, 2**64 - 1: 4333907348786404347}
    assert scalar_draws(key)[0] == (words[key] >> 11) * 2.0**-53


def test_normals_are_box_muller_in_float64_rounded_to_float32():
    key = noise_key(**BASE)
    words = [int(w) for w in np.random.Philox(key=key).random_raw(4 + 6)]
    u = np.array([(w >> 11) * 2.0**-53 for w in words[4:]])
    radius, angle = np.sqrt(-2 * np.log(1 - u[0::2])), 2 * np.pi * u[1::2]
    exact = np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1).ravel()
    found = normals(key, (6,))
    assert found.dtype == np.float32
    assert (found.astype(np.float64) != exact).all()  # they really are rounded
    np.testing.assert_array_equal(found, exact.astype(np.float32))


@pytest.mark.parametrize("changed, other", [
    ("seed", 1), ("seed", -1), ("stream", "grid"), ("stream", "trajectory"), ("stream", "order"), ("side", "query"),
    ("sample_id", "b"), ("sample_id", "A"), ("sample_id", "a "), ("position", 2), ("draw", 1), ("occurrence", 1),
])  # fmt: skip
def test_every_field_of_the_key_changes_the_noise(changed, other):
    base, changed_key = noise_key(**BASE), noise_key(**BASE | {changed: other})
    assert base != changed_key
    assert not (normals(base, (8,)) == normals(changed_key, (8,))).any()


def test_ids_cannot_collide_with_other_fields_or_each_other():
    """The id is the last field of the hashed text, so that no blank in it can pass for a separator."""
    ids = ["", " ", "1 2", "1  2", "2", "a", "a ", " a", "a b", "a/b", "a\nb", "a\n", "0 record train 1 0 0 a", "\0"]
    numbers = [(position, draw, occurrence) for position in (1, 11) for draw in (0, 1) for occurrence in (0, 1)]
    keys = [noise_key(0, "record", "train", i, *n) for i in ids for n in numbers]
    assert len(set(keys)) == len(ids) * len(numbers)


def test_digits_of_neighbouring_fields_do_not_run_together():
    tuples = [(1, 11), (11, 1), (111, 0), (1, 1)]
    for (seed, position), (other_seed, other_position) in combinations(tuples, 2):
        assert noise_key(seed, "grid", "query", "1", position) != noise_key(
            other_seed, "grid", "query", "1", other_position
        )


@pytest.mark.parametrize("shape, longer", [((3,), (4,)), ((1,), (9,)), ((2, 3), (2, 6)), ((3, 4, 4), (4, 4, 4))])
def test_a_longer_noise_begins_with_the_shorter_one(shape, longer):
    short, long = normals(5, shape), normals(5, longer)
    assert short.shape == shape
    np.testing.assert_array_equal(short.ravel(), long.ravel()[: short.size])


def test_the_noise_of_a_batch_is_that_of_its_samples():
    keys = [noise_key(0, "record", "train", str(k), 1) for k in range(5)]
    batch = normals_of_keys(keys, (2, 3))
    for key, noise in zip(keys, batch, strict=True):
        np.testing.assert_array_equal(normals(key, (2, 3)), noise)
    np.testing.assert_array_equal(normals_of_keys(np.array(keys, np.uint64), (2, 3)), batch)
    assert normals_of_keys([], (2, 3)).shape == (0, 2, 3)
    assert normals(1, (0,)).shape == (0,)


def test_normals_have_the_moments_of_a_standard_normal():
    values = normals_of_keys(range(400), (500,)).astype(np.float64).ravel()
    # Five standard errors of n = 200,000 independent draws: 1/sqrt(n), sqrt(2/n), sqrt(96/n); tail beyond 3 sigma.
    n = len(values)
    assert abs(values.mean()) < 5 / n**0.5
    assert abs(values.var() - 1) < 5 * (2 / n) ** 0.5
    assert abs((values**4).mean() - 3) < 5 * (96 / n) ** 0.5
    assert abs((np.abs(values) > 3).mean() - 0.0027) < 5 * (0.0027 / n) ** 0.5
    assert np.isfinite(values).all()
    # Neighbours of a pair share a radius, but must not be correlated.
    assert abs((values[0::2] * values[1::2]).mean()) < 5 / (n / 2) ** 0.5


def test_timesteps_are_uniform_and_half_of_the_visits_are_flipped():
    keys = [noise_key(0, "record", "train", f"image {k}", 1 + k // 32) for k in range(10_000)]
    timesteps = np.array([drawn_timestep(key, 50) for key in keys])
    counts = np.bincount(timesteps, minlength=50)
    assert len(counts) == 50
    chi_squared = ((counts - 200) ** 2 / 200).sum()
    assert 20 < chi_squared < 94  # 49 degrees of freedom, one in 10,000 on either side
    flips = np.array([drawn_flip(key) for key in keys])
    assert abs(flips.mean() - 0.5) < 5 * 0.5 / len(keys) ** 0.5
    # The flip comes from another word than the timestep.
    assert abs(np.corrcoef(flips, timesteps)[0, 1]) < 5 / len(keys) ** 0.5


@pytest.mark.parametrize("num_timesteps", [1, 2, 1000])
def test_timesteps_stay_in_range(num_timesteps):
    drawn = {drawn_timestep(key, num_timesteps) for key in range(200)}
    assert drawn <= set(range(num_timesteps))


def test_orders_are_golden_permutations():
    assert keyed_order(0, 0, 10).tolist() == [5, 9, 6, 3, 0, 8, 4, 1, 7, 2]
    assert keyed_order(1, 3, 10).tolist() == [9, 1, 4, 0, 2, 7, 8, 6, 5, 3]


@pytest.mark.parametrize("num_items", [0, 1, 2, 1000])
def test_an_order_is_a_permutation(num_items):
    assert sorted(keyed_order(2, 5, num_items).tolist()) == list(range(num_items))


def test_each_epoch_has_its_own_order():
    orders = {tuple(keyed_order(seed, epoch, 50).tolist()) for seed in range(3) for epoch in range(5)}
    assert len(orders) == 15
