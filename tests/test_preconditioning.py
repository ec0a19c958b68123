"""Methods with a preconditioner, against their formulas with whole gradients in float64, one event at a time."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import rankdata

import reference
from whence.attribution import trace
from whence.checkpoints import load_model, load_scheduler
from whence.config import IndexSettings, QuerySettings, TraceSettings
from whence.curvature.ridge import Ridge
from whence.errors import ConfigError, StoreError
from whence.indexing import index
from whence.methods import (
    D_TRAK,
    DAS,
    DAS_SIGNED,
    EKFAC,
    GAS,
    RELATIF,
    RELATIF_L,
    RENORMALISED,
    TRACIN_CP,
    TRAK,
)
from whence.plan import plan
from whence.querying import query

GRID = IndexSettings(
    grid=True,
    train_timesteps=3,
    train_draws=2,
    projection="identity",
    rows="float32",
    batch_size=8,
    block_size=4,
)
QUERY = QuerySettings(timesteps=5, draws=4, phases=2, batch_size=8)
DAMPING = 0.1
OF_THE_LOSS = [TRAK, RELATIF, RELATIF_L, RENORMALISED]


@pytest.fixture(scope="module")
def stores(subject, tmp_path_factory):
    """Stores by output function."""
    folder = tmp_path_factory.mktemp("run")
    outputs = ("loss", "squares", "mean")
    return {o: index(subject, replace(GRID, output=o), folder, show_progress=False) for o in outputs}


@pytest.fixture(scope="module")
def gradients(subject, toy_train, toy_queries):
    """Gradients at the last checkpoint by side and output, (sample, timestep, param)."""
    return gradients_at(subject.checkpoints[-1], toy_train, toy_queries, ("loss", "squares", "mean"))


def gradients_at(checkpoint, toy_train, toy_queries, outputs):
    model, scheduler = load_model(checkpoint, dtype="float64"), load_scheduler(checkpoint)
    found = {}
    for output in outputs:
        for side, images, grid in (("train", toy_train, (3, 2)), ("query", toy_queries, (5, 4))):
            per_sample = [
                reference.query_gradients(
                    model, scheduler, images.pixels([row])[0], images.ids[row], *grid, side=side, output=output
                )
                for row in range(len(images))
            ]
            found[side, output] = np.stack(per_sample)
    return found


def ask(subject, store, queries, methods, folder, **changes):
    settings = replace(QUERY, **{"damping": DAMPING} | changes)
    return query(subject, store, queries, methods, settings, folder, show_progress=False)


def features(method, gradients):
    """Phi and psi of a method."""
    sides = []
    for side, declared in (("train", method.train), ("query", method.query)):
        found = gradients[side, declared.output]
        if declared.unit == "timestep":
            found = found / np.linalg.norm(found, axis=2, keepdims=True)
        sides.append(found.mean(1))
    return sides


def explicit_scores(method, gradients, errors=None):
    phi, psi = features(method, gradients)
    gram = phi @ phi.T
    damping = DAMPING * np.trace(gram) / len(phi)
    inverse_gram = np.linalg.inv(gram + damping * np.eye(len(phi)))
    scores = psi @ phi.T @ inverse_gram
    # (Phi^T Phi + d)^-1 phi_i is column i of Phi^T (Phi Phi^T + d)^-1.
    moved = phi.T @ inverse_gram
    after = {
        "none": lambda: np.ones(len(phi)),
        "length": lambda: 1 / np.linalg.norm(phi, axis=1),
        "theta_relative": lambda: 1 / np.linalg.norm(moved, axis=0),
        "l_relative": lambda: np.diag(phi @ moved) ** -0.5,
        "residual": lambda: errors / (1 - np.diag(phi @ moved)),
    }[method.after]()
    scores = scores * after
    return scores**2 if method.squared else scores


def check(found, want):
    np.testing.assert_allclose(found.values, want, rtol=2e-3, atol=2e-3 * np.abs(want).max())
    for one, other in zip(found.values, want, strict=True):
        assert np.corrcoef(rankdata(one), rankdata(other))[0, 1] > 0.999
    if found.phases is not None:
        np.testing.assert_allclose(found.phases.sum(1), found.values, rtol=1e-4, atol=1e-6 * np.abs(want).max())


@pytest.mark.parametrize("method", OF_THE_LOSS, ids=lambda method: method.name)
def test_methods_on_the_loss(subject, stores, gradients, toy_queries, tmp_path, method):
    found = ask(subject, stores["loss"], toy_queries, [method], tmp_path)[method.name]
    check(found, explicit_scores(method, gradients))


def test_other_outputs(subject, stores, gradients, toy_queries, tmp_path):
    found = ask(subject, stores["squares"], toy_queries, [D_TRAK], tmp_path)["d-trak"]
    check(found, explicit_scores(D_TRAK, gradients))


@pytest.mark.parametrize("method", [DAS, DAS_SIGNED], ids=lambda method: method.name)
def test_das(subject, stores, gradients, toy_queries, toy_train, tmp_path, method):
    model, scheduler = load_model(subject.checkpoints[-1], dtype="float64"), load_scheduler(subject.checkpoints[-1])
    squares = [
        reference.mean_squared_error(model, scheduler, toy_train.pixels([row])[0], id_, timesteps=3, draws=2)
        for row, id_ in enumerate(toy_train.ids)
    ]
    found = ask(subject, stores["mean"], toy_queries, [method], tmp_path)[method.name]
    check(found, explicit_scores(method, gradients, np.sqrt(squares)))


@pytest.mark.parametrize("method", [TRAK, RELATIF_L], ids=lambda method: method.name)
def test_checkpoints_have_a_ridge_each_and_their_scores_are_added(
    subject, stores, gradients, toy_train, toy_queries, tmp_path, method
):
    over_all = replace(method, name="over all", checkpoints="all")
    found = ask(subject, stores["loss"], toy_queries, [over_all, method], tmp_path)
    first = gradients_at(subject.checkpoints[0], toy_train, toy_queries, ("loss",))
    want = explicit_scores(method, gradients)
    check(found["over all"], want + explicit_scores(method, first))
    check(found[method.name], want)
    assert found["over all"].checkpoint_steps == tuple(c.step for c in subject.checkpoints)
    ridges = found["over all"].details["preconditioners"]
    assert len({one["mean_eigenvalue"] for one in ridges.values()}) == 2
    chosen = ask(subject, stores["loss"], toy_queries, [over_all], tmp_path, damping="gcv")["over all"]
    assert all(len(one["tried"]) > 1 for one in chosen.details["preconditioners"].values())


@pytest.mark.parametrize("method", [TRACIN_CP, GAS], ids=lambda method: method.name)
def test_all_checkpoints_on_a_grid_as_streamed(subject, stores, toy_queries, tmp_path, method):
    found = query(subject, stores["loss"], toy_queries, [method], QUERY, tmp_path, show_progress=False)[method.name]
    settings = TraceSettings(**vars(QUERY), train_timesteps=3, train_draws=2)
    want = trace(subject, toy_queries, [method], settings, tmp_path, show_progress=False)[method.name]
    np.testing.assert_allclose(found.values, want.values, rtol=1e-3, atol=1e-4 * np.abs(want.values).max())
    assert len(found.checkpoint_steps) == 2


@pytest.mark.parametrize("method", [RELATIF, DAS], ids=lambda method: method.name)
def test_the_top_of_the_scores(subject, stores, toy_queries, tmp_path, method):
    store = stores[method.train.output]
    whole = ask(subject, store, toy_queries, [method], tmp_path)[method.name]
    settings = replace(QUERY, damping=DAMPING)
    top = query(subject, store, toy_queries, [method], settings, tmp_path, top=4, show_progress=False)[method.name]
    for row in range(3):
        assert [entry.train_id for entry in top.top(row, 4)] == [entry.train_id for entry in whole.top(row, 4)]
        want = [entry.score for entry in whole.top(row, 4)]
        assert [entry.score for entry in top.top(row, 4)] == pytest.approx(want, rel=1e-5)


def test_damping_is_chosen_without_the_queries_and_written_down(subject, stores, toy_queries, tmp_path, monkeypatch):
    found = ask(subject, stores["loss"], toy_queries, [TRAK], tmp_path, damping="gcv")["trak"]
    (about,) = found.details["preconditioners"].values()
    assert about["damping"] == about["tried"][int(np.argmin(about["errors"]))]
    assert len(about["tried"]) == len(about["errors"]) > 20 and about["mean_eigenvalue"] > 0
    monkeypatch.setattr("whence.preconditioning.Ridge.of", lambda *a: pytest.fail("it was decomposed again"))
    fewer = ask(subject, stores["loss"], toy_queries.select([1]), [TRAK], tmp_path, damping="gcv")["trak"]
    assert fewer.details["preconditioners"] == found.details["preconditioners"]
    np.testing.assert_allclose(fewer.values[0], found.values[1], rtol=1e-5)


def test_a_choice_at_the_edge_is_noted(subject, stores, toy_queries, tmp_path, monkeypatch):
    choose = Ridge.choose_damping
    monkeypatch.setattr(Ridge, "choose_damping", lambda self, blocks: choose(self, blocks, (1e-8, 2e-8)))
    found = ask(subject, stores["loss"], toy_queries, [TRAK], tmp_path, damping="gcv")["trak"]
    assert any("is the first or the last that was tried" in note for note in found.notes)


def test_they_cannot_be_traced(subject, toy_queries, tmp_path):
    settings = TraceSettings(**vars(QUERY))
    with pytest.raises(ConfigError, match=r"trak, d-trak cannot be traced: .*`whence index RUN --grid`"):
        trace(subject, toy_queries, [TRAK, D_TRAK], settings, tmp_path, show_progress=False)
    with pytest.raises(ConfigError, match=r"d-trak cannot be traced: .*`whence index RUN --grid --output squares`"):
        trace(subject, toy_queries, [D_TRAK], settings, tmp_path, show_progress=False)


def test_a_trace_that_is_impossible_is_not_planned(subject, toy_queries, tmp_path):
    with pytest.raises(ConfigError, match="trak cannot be traced"):
        plan(subject, toy_queries, [TRAK], TraceSettings(**vars(QUERY)), tmp_path)


def test_a_store_of_another_output(subject, stores, toy_queries, tmp_path):
    with pytest.raises(StoreError, match=r"needs gradients of squares, .* loss.*--output squares"):
        ask(subject, stores["loss"], toy_queries, [D_TRAK], tmp_path)


def test_a_store_without_errors(subject, toy_queries, tmp_path):
    store = index(subject, replace(GRID, output="mean", keep="sum"), tmp_path, show_progress=False)
    with pytest.raises(StoreError, match=r"das needs the errors of the predictions.* keep='units'"):
        ask(subject, store, toy_queries, [DAS], tmp_path)


@pytest.mark.parametrize("damping", [-1.0, float("nan"), float("inf")])
def test_damping_below_zero(subject, stores, toy_queries, tmp_path, damping):
    with pytest.raises(ConfigError, match="damping must be 0 or more, or gcv; found"):
        ask(subject, stores["loss"], toy_queries, [TRAK], tmp_path, damping=damping)


def test_damping_without_a_preconditioner(subject, stores, toy_queries, tmp_path):
    with pytest.warns(UserWarning, match="damping has no effect"):
        ask(subject, stores["loss"], toy_queries, [GAS], tmp_path)


def test_what_comes_after_needs_the_preconditioner(subject, stores, toy_queries, tmp_path):
    odd = replace(GAS, after="l_relative")
    with pytest.raises(ConfigError, match="after='l_relative' needs a RidgeInverse"):
        query(subject, stores["loss"], toy_queries, [odd], QUERY, tmp_path, show_progress=False)


def test_cross_validation_is_for_ridge_methods_only(subject, toy_queries, tmp_path):
    with pytest.raises(ConfigError, match="a ridge inverse; ekfac has another. Give a number"):
        trace(subject, toy_queries, [EKFAC], TraceSettings(damping="gcv"), tmp_path, show_progress=False)


@pytest.mark.parametrize(("method", "default"), [(TRAK, 10.0), (RELATIF, 10.0), (D_TRAK, 0.1), (DAS, 0.1)])
def test_the_default_damping_depends_on_what_gradients_are_of(method, default, subject, stores, toy_queries, tmp_path):
    store = stores[method.train.output]
    found = ask(subject, store, toy_queries, [method], tmp_path, damping=None)[method.name]
    (about,) = found.details["preconditioners"].values()
    assert about["damping"] == default and "tried" not in about
    np.testing.assert_array_equal(
        ask(subject, store, toy_queries, [method], tmp_path, damping=default)[method.name].values, found.values
    )
