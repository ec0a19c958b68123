import numpy as np
import pytest

from conftest import toy_images
from whence.data import ImageData, concatenate
from whence.duplicates import pixel_distances, same_pixels
from whence.errors import ConfigError, DataError, ScoresError
from whence.evaluation import chance_average_precision
from whence.retrieval import CHANCE, detection_table, retrieval_table
from whence.scores import Scores


def figures(table, method):
    (row,) = [row for row in table["rows"] if row[0] == method]
    return dict(zip(table["columns"], row, strict=True))


def shifted(images, by, prefix):
    """The same images, all pixels moved towards white."""
    pixels = images.pixels(range(len(images)))
    return ImageData.from_arrays(np.clip(pixels + by, -1, 1), [f"{prefix}-{k}" for k in range(len(images))])


def test_retrieval_separates_queries_of_the_planted_group_from_others():
    train, queries = toy_images(10), toy_images(10, "query", seed=1)  # rows 4 and 9 are "odd"
    values = np.zeros((10, 10))
    values[4, [4, 9]] = values[9, [4, 0]] = values[0, [4, 1]] = 1.0
    values[[1, 2, 3, 5, 6, 7, 8], :2] = 1.0
    scores = Scores("by hand", queries.ids, train.ids, values)
    table = retrieval_table([scores], train, queries, planted="odd", k=2)
    found = figures(table, "by hand")
    assert (found["precision@2"], found["false@2"]) == (0.75, pytest.approx(0.5 / 8, abs=1e-3))
    assert (found["unique@2"], found["widest@2"]) == (pytest.approx(4 / 20), pytest.approx(0.8))
    # Row 4 ranks 4, 9 first; row 9 ranks 0, 4, 1, 2, 3, 5, 6, 7, 8, 9.
    assert found["AP"] == pytest.approx((1 + (1 / 2 + 2 / 10) / 2) / 2, abs=1e-3)
    assert "self-rank" not in table["columns"] and "reliability" not in table["columns"]
    chance = figures(table, CHANCE)
    assert (chance["precision@2"], chance["false@2"]) == (0.2, 0.2)
    assert chance["AP"] == pytest.approx(chance_average_precision(2, 10), abs=1e-3)
    assert chance["unique@2"] == pytest.approx(10 * (1 - 0.8**10) / 20, abs=1e-3)
    assert found["unique@2"] < chance["unique@2"]


def test_without_a_planted_group_queries_should_find_their_own_label():
    train, queries = toy_images(10), toy_images(5, "query", seed=1)
    assert train.labels is not None and queries.labels is not None
    right = np.array([[label == asked for label in train.labels] for asked in queries.labels], dtype=np.float64)
    table = retrieval_table(
        [Scores("right", queries.ids, train.ids, right), Scores("wrong", queries.ids, train.ids, -right)],
        train,
        queries,
        k=2,
    )
    assert (figures(table, "right")["precision@2"], figures(table, "right")["AP"]) == (1.0, 1.0)
    assert figures(table, "wrong")["precision@2"] == 0.0
    assert figures(table, CHANCE)["precision@2"] == pytest.approx((4 * 0.8 + 0.2) / 5, abs=1e-3)
    assert "false@2" not in table["columns"]


def test_a_training_image_as_query_finds_itself_and_does_not_count_as_its_neighbour():
    train = toy_images(10)
    queries = train.select([4, 0])
    values = np.zeros((2, 10))
    values[0, [4, 9]] = [3.0, 2.0]
    values[1, [7, 0]] = [3.0, 2.0]
    table = retrieval_table([Scores("by hand", queries.ids, train.ids, values)], train, queries, planted="odd", k=1)
    found = figures(table, "by hand")
    assert found["self-rank"] == 1.5  # first, and second
    assert found["precision@1"] == 1.0  # the other odd one is first, once the query is left out
    assert figures(table, CHANCE)["precision@1"] == pytest.approx(1 / 9, abs=1e-3)
    assert figures(table, CHANCE)["self-rank"] == 5.5
    assert any("for the 2 queries whose pixels" in note for note in table["notes"])


def test_near_duplicates_are_found_by_their_pixels():
    base = toy_images(6)
    queries = shifted(base.select([0, 1]), 0.0, "query")
    near = shifted(base.select([0]), 0.02, "near")
    train = concatenate([toy_images(5, "other", seed=3), near])
    values = np.zeros((2, 6))
    values[0, [2, 5]] = [2.0, 1.0]
    table = retrieval_table([Scores("by hand", queries.ids, train.ids, values)], train, queries, k=2)
    assert figures(table, "by hand")["near AP"] == 0.5
    assert any("for the 1 queries that have some" in note for note in table["notes"])


def test_pixel_distances_are_those_of_a_loop():
    train, queries = toy_images(6), concatenate([toy_images(2, "query", seed=1), toy_images(6, "copy").select([3])])
    a, b = queries.pixels(range(3)).astype(np.float64), train.pixels(range(6)).astype(np.float64)
    want = [[np.sqrt(np.mean((x - y) ** 2)) for y in b] for x in a]
    np.testing.assert_allclose(pixel_distances(queries, train), want, atol=1e-12)
    assert pixel_distances(queries, train)[2, 3] == 0.0
    assert np.argwhere(same_pixels(queries, train)).tolist() == [[2, 3]]


def test_scores_of_one_method_are_told_apart_and_lds_stands_beside(tmp_path):
    train, queries = toy_images(6), toy_images(2, "query", seed=1)
    scores = Scores("trak", queries.ids, train.ids, np.arange(12.0).reshape(2, 6))
    for name in ("trak-a", "trak-b"):
        scores.save(tmp_path / name)
    both = [Scores.load(tmp_path / name) for name in ("trak-a", "trak-b")]
    table = retrieval_table(both, train, queries, lds={"trak-a": 0.25})
    assert [figures(table, name)["LDS"] for name in ("trak-a", "trak-b", CHANCE)] == [0.25, None, 0.0]


def test_a_table_of_diversity_alone_says_that_it_means_nothing():
    train, queries = toy_images(6), shifted(toy_images(2, seed=1), 0.0, "query")
    table = retrieval_table([Scores("any", queries.ids, train.ids, np.zeros((2, 6)))], train, queries)
    assert any("nothing here that says whether a ranking is right" in note for note in table["notes"])


def test_flipped_labels_are_found_by_self_influence():
    train = toy_images(6)
    scores = Scores("self_norm", ("self",), train.ids, np.array([[9.0, 1.0, 8.0, 2.0, 7.0, 3.0]]))
    table = detection_table([scores], ["train-0", "train-4"])
    assert table["rows"][0] == ["self_norm", 0.5, round((1 + 2 / 3) / 2, 3)]
    assert table["rows"][1] == [CHANCE, round(2 / 6, 3), round(chance_average_precision(2, 6), 3)]
    with pytest.raises(DataError, match="must be among the training images; 1 are not, for example cat"):
        detection_table([scores], ["train-0", "cat"])
    with pytest.raises(ScoresError, match="make some with `whence self RUN`"):
        detection_table([], ["train-0"])


@pytest.mark.parametrize(
    "planted, k, distance, error, message",
    [
        ("dragon", 2, 0.1, DataError, "No training image has the label 'dragon'; there are even, odd"),
        ("odd", 0, 0.1, ConfigError, "k must be above 0"),
        ("odd", 2, -1.0, ConfigError, "near-duplicates must be 0 or more, found -1"),
    ],
)
def test_a_group_that_is_not_there_is_refused(planted, k, distance, error, message):
    with pytest.raises(error, match=message):
        retrieval_table([], toy_images(5), toy_images(5, "query"), planted, k, near_distance=distance)


def test_retrieval_needs_labels():
    train = toy_images(3)
    bare = type(train).from_arrays(train.pixels(range(3)), train.ids)
    with pytest.raises(DataError, match="need a label"):
        retrieval_table([], bare, train, planted="odd")


def test_scores_of_other_images_are_refused():
    train, queries = toy_images(3), toy_images(2, "query")
    with pytest.raises(ScoresError, match="train ids of the any scores are not those of the train images"):
        retrieval_table([Scores("any", queries.ids, ("a",), np.zeros((2, 1)))], train, queries)
