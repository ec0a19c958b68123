"""Preconditioned sums of whole gradients, projected, against streaming."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

import whence.query_vectors
from conftest import EXACT, QUERY, ask, stream, toy_images
from whence.curvature.iterative import conjugate_gradient
from whence.indexing import index
from whence.inverse_curvature import DataInf
from whence.methods import (
    DATAINF,
    EKFAC,
    GRAD_COS,
    INFLUENCE_CG,
    KFAC,
    LISSA,
    MATCHED_COS,
    RETRAC_ADAM,
    RETRAC_MATCHED,
    TRACIN_ADAM,
    Grid,
)
from whence.methods.frame import AdamInverse
from whence.query_vectors import make_query_side
from whence.store_spec import trace_settings
from whence.subject import Subject
from whence.workload import Workload

GRID = replace(EXACT, grid=True, checkpoints="last", train_timesteps=3, train_draws=2)
SKETCH = replace(GRID, projection="two_sided_sketch", side=128)  # sides that shrink nothing: all error is of the width


def small(method, **changes):
    """The same method with a curvature of few events."""
    return replace(method, precondition=replace(method.precondition, events=Grid(timesteps=2), **changes))


KRONECKER = [small(KFAC), small(EKFAC)]
CG = small(INFLUENCE_CG, num_images=2, damping=100.0)
SERIES = small(LISSA, num_images=2, depth=4, repeats=1, events_per_step=None)
RANK_ONE = small(DATAINF)


@pytest.fixture(scope="module")
def grid_store(subject, tmp_path_factory):
    return index(subject, GRID, tmp_path_factory.mktemp("run"), show_progress=False)


def check_equal(found, want, tol=1e-5):
    """Within rounding, against the largest score of each query."""
    scale = np.abs(want.values).max(1)[:, None]
    assert (np.abs(found.values - want.values) <= tol * scale).all()
    assert (np.abs(found.phases - want.phases) <= tol * scale[:, None]).all()
    assert (np.abs(found.halves - want.halves) <= 4 * tol * scale).all()
    for name in ("train_norms", "train_weights", "query_norms"):
        np.testing.assert_allclose(getattr(found, name), getattr(want, name), rtol=1e-5)
    for name in ("preconditioners", "curvature_images"):
        assert found.details.get(name) == want.details.get(name)
    assert found.phase_timesteps == want.phase_timesteps and found.checkpoint_steps == want.checkpoint_steps


class TestEqualToStreaming:
    """With an identity projection and float32 rows, only rounding may differ; streaming has a reference of its own."""

    def check(self, subject, store, queries, methods, folder, **changes):
        want = stream(subject, queries, methods, folder, **changes)
        found = ask(subject, store, queries, methods, folder)
        assert list(found) == list(want) == [method.name for method in methods]
        for name in want:
            check_equal(found[name], want[name])

    @pytest.mark.parametrize("method", [*KRONECKER, CG, RANK_ONE], ids=lambda m: m.name)
    def test_influence(self, subject, grid_store, toy_queries, tmp_path, method):
        self.check(subject, grid_store, toy_queries, [method], tmp_path, train_timesteps=3, train_draws=2)

    @pytest.mark.filterwarnings("ignore:LiSSA left a relative residual")
    def test_a_cut_off_series(self, subject, grid_store, toy_queries, tmp_path):
        self.check(subject, grid_store, toy_queries, [SERIES], tmp_path, train_timesteps=3, train_draws=2)

    def test_adam_at_all_checkpoints(self, subject, store, toy_queries, tmp_path):
        self.check(subject, store, toy_queries, [TRACIN_ADAM, RETRAC_ADAM], tmp_path)

    def test_unit_sums_are_of_lengths_before_the_preconditioner(self, subject, grid_store, toy_queries, tmp_path):
        assert GRAD_COS.query.unit == "sample"
        method = replace(GRAD_COS, precondition=KRONECKER[1].precondition)
        self.check(subject, grid_store, toy_queries, [method], tmp_path, train_timesteps=3, train_draws=2)

    @pytest.mark.parametrize("precondition", [AdamInverse(), RANK_ONE.precondition], ids=["adam", "datainf"])
    def test_timestep_by_timestep(self, subject, toy_queries, tmp_path, precondition):
        held = index(subject, replace(GRID, train_timesteps=5), tmp_path, show_progress=False)
        method = replace(MATCHED_COS, precondition=precondition)
        self.check(subject, held, toy_queries, [method], tmp_path, train_timesteps=5, train_draws=2)

    def test_replayed_timestep_by_timestep(self, subject, store, toy_queries, tmp_path):
        method = replace(RETRAC_MATCHED, precondition=AdamInverse())
        self.check(subject, store, toy_queries, [method], tmp_path)


class TestProjection:
    """What a sketch does to products with preconditioned vectors."""

    def errors(self, subject, queries, folder, width, seeds):
        """Errors of EK-FAC in units of |M psi| |phi|."""
        identity = index(subject, GRID, folder, show_progress=False)
        want = ask(subject, identity, queries, [KRONECKER[1]], folder)["ekfac"]
        side = make_query_side(
            Workload(
                subject,
                queries,
                [replace(KRONECKER[1], train=EKFAC.train, query=replace(EKFAC.query, events=Grid(5, 4)))],
                trace_settings(identity.spec, QUERY),
            ),
            identity,
            folder / "cache",
        )
        solved = side.read(12, range(3)).vectors[0, :, :2].sum(1)  # of both phases
        shards = identity.shards(12)
        rows = np.concatenate([shard.read("rows") * shard.read("norms")[:, None] for shard in shards])
        order = np.argsort(subject.train.rows([id_ for shard in shards for id_ in shard.ids]))
        phi = rows.reshape(10, 3, -1).mean(1)[order]
        np.testing.assert_allclose(
            want.values, solved.numpy() @ phi.T, rtol=1e-3, atol=1e-4 * np.abs(want.values).max()
        )
        lengths = torch.linalg.vector_norm(solved, dim=1).numpy()[:, None] * np.linalg.norm(phi, axis=1)
        found = []
        for seed in seeds:
            held = index(subject, replace(SKETCH, width=width, projection_seed=seed), folder, show_progress=False)
            found.append(ask(subject, held, queries, [KRONECKER[1]], folder)["ekfac"].values - want.values)
        return np.stack(found) / lengths

    def test_a_sketch_is_right_on_average(self, subject, toy_queries, tmp_path):
        found = self.errors(subject, toy_queries, tmp_path, width=256, seeds=range(10))
        rms, of_mean = np.sqrt((found**2).mean()), np.sqrt((found.mean(0) ** 2).mean())
        print("rms, and that of the mean over seeds:", rms, of_mean)
        assert rms < np.sqrt(2 / 256)  # the largest standard deviation for unit vectors
        assert of_mean < 2 * rms / np.sqrt(10)

    def test_a_wide_sketch_is_close(self, subject, toy_queries, tmp_path):
        found = self.errors(subject, toy_queries, tmp_path, width=4096, seeds=range(2))
        assert np.sqrt((found**2).mean()) < np.sqrt(2 / 4096)


class TestCache:
    def test_asking_again_costs_nothing(self, subject, store, toy_queries, tmp_path, monkeypatch):
        first = ask(subject, store, toy_queries, [TRACIN_ADAM], tmp_path)["tracin-adam"]
        shutil.rmtree(tmp_path / "scores")
        monkeypatch.setattr(Subject, "source", lambda *a: pytest.fail("a model was loaded"))
        again = ask(subject, store, toy_queries, [TRACIN_ADAM], tmp_path)["tracin-adam"]
        np.testing.assert_array_equal(again.values, first.values)
        top = ask(subject, store, toy_queries, [TRACIN_ADAM], tmp_path, top=3)["tracin-adam"]
        for row in range(3):
            assert [e.train_id for e in top.top(row)] == [e.train_id for e in first.top(row, 3)]
            np.testing.assert_allclose([e.score for e in top.top(row)], np.sort(first.values[row])[:-4:-1], rtol=1e-4)

    def test_the_curvature_of_a_trace_serves(self, subject, grid_store, toy_queries, tmp_path, monkeypatch):
        stream(subject, toy_queries, [KRONECKER[0]], tmp_path, train_timesteps=3, train_draws=2)
        monkeypatch.setattr("whence.second_order._make_curvature", lambda *a: pytest.fail("it was made again"))
        one = ask(subject, grid_store, toy_queries.select([0]), [KRONECKER[0]], tmp_path)["kfac"]
        damped = ask(subject, grid_store, toy_queries.select([0]), [small(KFAC, damping=1.0)], tmp_path)["kfac"]
        assert np.abs(damped.values).max() < np.abs(one.values).max()

    def test_what_is_solved_is_kept(self, subject, grid_store, toy_queries, tmp_path, monkeypatch):
        solved = []

        def solve(*args, **options):
            if len(solved) == 2:
                raise KeyboardInterrupt
            solved.append(1)
            return conjugate_gradient(*args, **options)

        monkeypatch.setattr("whence.inverse_curvature.conjugate_gradient", solve)
        with pytest.raises(KeyboardInterrupt):
            ask(subject, grid_store, toy_queries, [CG], tmp_path)
        solved.clear()
        found = ask(subject, grid_store, toy_queries, [CG], tmp_path)["influence-cg"]
        assert len(solved) == 1
        residual = found.details["preconditioners"]["12"]["residual"]
        assert any(f"solved to a relative residual of {residual:.2g}" in note for note in found.notes)

    def test_a_store_that_has_grown_has_another_curvature(self, subject, toy_queries, tmp_path):
        fewer = replace(subject, record=None, train=toy_images(8))
        more = replace(fewer, train=toy_images(10))
        ask(fewer, index(fewer, GRID, tmp_path, show_progress=False), toy_queries, [KRONECKER[1]], tmp_path)
        found = ask(more, index(more, GRID, tmp_path, show_progress=False), toy_queries, [KRONECKER[1]], tmp_path)
        want = stream(more, toy_queries, [KRONECKER[1]], tmp_path, train_timesteps=3, train_draws=2)
        check_equal(found["ekfac"], want["ekfac"])

    def test_queries_that_do_not_fit_take_turns(self, subject, grid_store, toy_queries, tmp_path, monkeypatch):
        want = ask(subject, grid_store, toy_queries, [RANK_ONE], tmp_path / "once")["datainf"]
        monkeypatch.setattr(whence.query_vectors, "QUERY_BYTES", 1)
        turns, apply_ = [], DataInf.apply_
        monkeypatch.setattr(DataInf, "apply_", lambda self, v, update: turns.append(len(v)) or apply_(self, v, update))
        found = ask(subject, grid_store, toy_queries, [RANK_ONE], tmp_path)["datainf"]
        assert turns == [3, 3, 3]  # two phases and a half
        check_equal(found, want)


def test_notes_say_what_was_projected(subject, grid_store, toy_queries, tmp_path):
    exact = ask(subject, grid_store, toy_queries, [KRONECKER[1]], tmp_path)["ekfac"]
    assert not any("projected" in note or "projection" in note for note in exact.notes)
    held = index(subject, replace(SKETCH, width=64), tmp_path, show_progress=False)
    sketched = ask(subject, held, toy_queries, [KRONECKER[1]], tmp_path)["ekfac"]
    assert any("gradients projected to 64 numbers" in note for note in sketched.notes)
    assert any("preconditioner is applied before the projection" in note for note in sketched.notes)
