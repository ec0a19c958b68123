"""Ground truth on disk: round trip, plain numpy, golden format, and every kind of damage."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from whence._files import sha256_of_json
from whence.errors import GroundTruthError
from whence.ground_truth import GroundTruth, sha256_of_array, split_subsets

GOLDEN = Path(__file__).parent / "golden" / "ground_truth-1"


def small_truth(num_subsets=6, num_seeds=2, num_queries=3, num_train=5, seed=0) -> GroundTruth:
    """Numbers that a ground truth could hold."""
    rng = np.random.default_rng(seed)
    return GroundTruth(
        subsets=rng.permuted(np.tile(np.arange(num_train) < 3, (num_subsets, 1)), axis=1),
        train_ids=tuple(f"train-{k}" for k in range(num_train)),
        seeds=tuple(range(num_seeds)),
        query_ids=tuple(f"query-{k}" for k in range(num_queries)),
        query_sets=tuple("generated" if k % 2 else "validation" for k in range(num_queries)),
        query_hashes=tuple(f"{k}" * 8 for k in range(num_queries)),
        measures=("loss", "mse"),
        outputs=rng.normal(size=(2, num_subsets, num_seeds, num_queries)),
        timesteps=np.tile(np.arange(4) * 10, (num_queries, 1)),
        timestep_loss=rng.random((num_subsets, num_seeds, num_queries, 4), dtype=np.float32),
        models=tuple(tuple(f"{m}{s}" * 3 for s in range(num_seeds)) for m in range(num_subsets)),
        details={"settings": {"fraction": 0.6}, "notes": ["made by hand"]},
    )


def assert_same(found: GroundTruth, want: GroundTruth):
    for name, value in vars(want).items():
        if name in ("folder", "subset_hashes"):
            continue
        if isinstance(value, np.ndarray):
            assert getattr(found, name).dtype == value.dtype
            np.testing.assert_array_equal(getattr(found, name), value)
        else:
            assert getattr(found, name) == value


def test_it_comes_back_as_it_was_written(tmp_path):
    truth = small_truth()
    truth.save(tmp_path / "truth")
    loaded = GroundTruth.load(tmp_path / "truth")
    assert_same(loaded, truth)
    assert loaded.folder == tmp_path / "truth" and loaded.notes == ["made by hand"]
    before = {f.name: f.read_bytes() for f in (tmp_path / "truth").iterdir()}
    loaded.save(tmp_path / "again")
    assert {f.name: f.read_bytes() for f in (tmp_path / "again").iterdir()} == before


def test_plain_numpy_reads_it(tmp_path):
    truth = small_truth()
    truth.save(tmp_path)
    with np.load(tmp_path / "ground_truth.npz", allow_pickle=False) as file:
        np.testing.assert_array_equal(file["outputs"][list(file["measures"]).index("loss")], truth.output("loss"))
        assert file["train_ids"][file["subsets"][0]].tolist() == [
            id_ for id_, member in zip(truth.train_ids, truth.subsets[0], strict=True) if member
        ]
    manifest = json.loads((tmp_path / "ground_truth.json").read_text())
    assert "lower is better" in manifest["sign"] and manifest["query_sets"] == {"validation": 2, "generated": 1}


def test_the_first_format_version_still_opens(tmp_path):
    loaded = GroundTruth.load(GOLDEN)
    assert loaded.train_ids == ("a", "b", "ü") and loaded.seeds == (0, 3)
    np.testing.assert_array_equal(loaded.subsets, [[True, True, False], [False, True, True]])
    np.testing.assert_array_equal(loaded.output("loss")[..., 0], [[0.5, 0.25], [1.0, 2.0]])
    np.testing.assert_array_equal(loaded.timestep_loss[1, 1, 0], np.float32([1.5, 2.5]))
    assert loaded.subset_hashes[0] == sha256_of_json(["a", "b"])
    loaded.save(tmp_path / "again")
    same = (tmp_path / "again" / "ground_truth.json").read_bytes() == (GOLDEN / "ground_truth.json").read_bytes()
    assert same, "the format changed: raise FORMAT_VERSION and keep reading the old one"


def test_a_subset_is_known_by_its_members_whatever_the_order():
    truth = small_truth()
    order = [3, 1, 4, 0, 2]
    moved = replace(truth, subsets=truth.subsets[:, order], train_ids=tuple(truth.train_ids[k] for k in order))
    assert moved.subset_hashes == truth.subset_hashes and len(set(truth.subset_hashes)) > 1


def test_a_selection_keeps_what_belongs_together():
    truth = small_truth()
    part = truth.select(subsets=[4, 1], queries=[2])
    assert part.query_ids == ("query-2",) and part.query_sets == ("validation",)
    assert part.query_hashes == ("22222222",)
    assert part.models == (truth.models[4], truth.models[1])
    np.testing.assert_array_equal(part.output("mse"), truth.output("mse")[[4, 1]][..., [2]])
    np.testing.assert_array_equal(part.timestep_loss, truth.timestep_loss[[4, 1]][:, :, [2]])


def test_a_split_has_every_subset_once():
    truth = small_truth()
    fit, rest = split_subsets(truth, 2, offset=3)
    np.testing.assert_array_equal(fit.subsets, truth.subsets[[3, 4]])
    np.testing.assert_array_equal(rest.outputs, truth.outputs[:, [0, 1, 2, 5]])
    for num_fit, offset in [(1, 0), (5, 0), (3, 4), (3, -1)]:
        with pytest.raises(GroundTruthError, match="Of 6 subsets, at least 2 must be left"):
            split_subsets(truth, num_fit, offset=offset)


def test_an_unknown_measure_lists_the_known_ones():
    with pytest.raises(GroundTruthError, match="no measure 'elbo'; there are loss, mse"):
        small_truth().output("elbo")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_ids": ("a", "b")}, r"subsets must have shape \(6, 2\) and hold booleans, found \(6, 5\) of bool"),
        ({"outputs": np.zeros((2, 6, 2, 4))}, r"outputs must have shape \(2, 6, 2, 3\)"),
        ({"query_ids": ("q", "q", "r")}, "query_ids must differ, found q more than once"),
        ({"query_sets": ("validation",)}, "query_sets must name the set of each of 3 queries, found 1"),
        ({"query_hashes": ("x",)}, "query_hashes must have one for each of 3 queries, found 1"),
        ({"models": (("x",),)}, "models must have a hash for each of 6 subsets and 2 seeds"),
        ({"outputs": np.full((2, 6, 2, 3), np.nan)}, "loss of query query-0, subset 0, seed 0 is nan"),
        ({"subsets": np.zeros((6, 5), dtype=bool)}, "subset 0 has no members"),
        ({"seeds": (1, 1)}, "seeds must differ, found 1 more than once"),
    ],
)
def test_what_does_not_fit_together_is_refused(changes, message):
    with pytest.raises(GroundTruthError, match=message):
        replace(small_truth(), **changes)


def alter_array(folder):
    with np.load(folder / "ground_truth.npz") as file:
        arrays = dict(file)
    arrays["outputs"][0, 0, 0, 0] += 1e-12
    np.savez(folder / "ground_truth.npz", **arrays)


def drop_array(folder):
    with np.load(folder / "ground_truth.npz") as file:
        arrays = {name: array for name, array in file.items() if name != "seeds"}
    np.savez(folder / "ground_truth.npz", **arrays)


def cut_arrays(folder):
    path = folder / "ground_truth.npz"
    path.write_bytes(path.read_bytes()[:-200])


def edit_manifest(folder, **changes):
    path = folder / "ground_truth.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (alter_array, "outputs differ from their checksum"),
        (drop_array, "lacks seeds"),
        (cut_arrays, "ground_truth.npz cannot be read"),
        (lambda folder: (folder / "ground_truth.npz").unlink(), "ground_truth.npz cannot be read"),
        (lambda folder: (folder / "ground_truth.json").unlink(), "holds no readable ground truth"),
        (lambda folder: (folder / "ground_truth.json").write_text("{}"), "is no manifest of a ground truth"),
        (lambda folder: edit_manifest(folder, format_version=9), "format version 9; this version of whence reads 1"),
        (lambda folder: edit_manifest(folder, details={}), "ground_truth.json is damaged"),
    ],
)
def test_damage_is_named(tmp_path, damage, message):
    small_truth().save(tmp_path / "truth")
    damage(tmp_path / "truth")
    with pytest.raises(GroundTruthError, match=message):
        GroundTruth.load(tmp_path / "truth")


def test_a_pickle_is_not_opened(tmp_path):
    truth = small_truth()
    truth.save(tmp_path)
    with np.load(tmp_path / "ground_truth.npz") as file:
        arrays = dict(file) | {"train_ids": np.array(truth.train_ids, dtype=object)}
    np.savez(tmp_path / "ground_truth.npz", **arrays)
    with pytest.raises(GroundTruthError, match=re.escape("allow_pickle=False")):
        GroundTruth.load(tmp_path)


def test_text_is_hashed_by_its_characters():
    wide, narrow = np.array(["a", "bc"], dtype="<U9"), np.array(["a", "bc"])
    assert sha256_of_array(wide) == sha256_of_array(narrow) != sha256_of_array(np.array(["ab", "c"]))
    assert sha256_of_array(np.zeros(2)) != sha256_of_array(np.zeros((2, 1)))
