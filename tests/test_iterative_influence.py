"""Influence by conjugate gradients, LiSSA and DataInf against dense matrices, on a trained model, in float64."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

import reference
import whence.streaming
from whence._files import sha256_of_json
from whence.attribution import trace
from whence.checkpoints import list_checkpoints, load_model, load_scheduler
from whence.config import TraceSettings
from whence.diffusion.noise import keyed_order
from whence.errors import ConfigError, NumericsError
from whence.inverse_curvature import ConjugateGradients, DataInf
from whence.methods import DATAINF, GRAD_DOT, INFLUENCE_CG, LISSA, Grid
from whence.plan import plan
from whence.progress import progress_bar
from whence.record import Record
from whence.subject import Subject

PATTERNS = ("conv_in.*", "mid_block.attentions.0.*", "conv_norm_out.*", "conv_out.*")
SETTINGS = TraceSettings(
    timesteps=4,
    draws=2,
    phases=1,
    train_timesteps=2,
    train_draws=1,
    batch_size=8,
    block_size=4,
    dtype="float64",
    parameters=PATTERNS,
    damping=1.0,
)
SMALL = Grid(timesteps=2)
CG = replace(INFLUENCE_CG, precondition=replace(INFLUENCE_CG.precondition, events=SMALL, num_images=3))
SERIES = replace(
    LISSA,
    precondition=replace(
        LISSA.precondition, events=SMALL, num_images=3, depth=12, repeats=2, events_per_step=2, power_iterations=5
    ),
)
DATA_INF = replace(DATAINF, precondition=replace(DATAINF.precondition, events=SMALL))


@pytest.fixture(scope="module")
def model(subject):
    """In float64, with gradients of the chosen parameters alone."""
    model = load_model(subject.checkpoints[-1], dtype="float64")
    chosen = subject.source(subject.checkpoints[-1], SETTINGS).layout.spans
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)
    return model


@pytest.fixture(scope="module")
def dense(subject, model, toy_train):
    """The Gauss-Newton matrix of the three images that the seed draws, and each event's part."""
    rows = sorted(keyed_order(0, 0, 10)[:3].tolist())
    parameters = [p for p in model.parameters() if p.requires_grad]
    return reference.gauss_newton(model, load_scheduler(subject.checkpoints[-1]), toy_train, rows, 2, parameters)


def gradients_of(subject, model, images, timesteps, draws, side):
    scheduler = load_scheduler(subject.checkpoints[-1])
    found = [
        reference.query_gradients(
            model, scheduler, images.pixels([row])[0], images.ids[row], timesteps, draws, side=side
        ).mean(0)
        for row in range(len(images))
    ]
    return torch.stack(found)


@pytest.fixture(scope="module")
def phi(subject, model, toy_train):
    return gradients_of(subject, model, toy_train, 2, 1, "train")


@pytest.fixture(scope="module")
def psi(subject, model, toy_queries):
    return gradients_of(subject, model, toy_queries, 4, 2, "query")


def traced(subject, queries, method, folder, settings=SETTINGS):
    return trace(subject, queries, [method], settings, folder, show_progress=False)[method.name]


def about(scores):
    (found,) = scores.details["preconditioners"].values()
    return found


def dense_scores(dense, damping, psi, phi):
    return (torch.linalg.solve(dense + damping * torch.eye(len(dense)).double(), psi.T).T @ phi.T).numpy()


def assert_near(found, want, tolerance):
    np.testing.assert_allclose(found, want, atol=tolerance * np.abs(want).max(), rtol=0)


def with_precondition(method, **changes):
    return replace(method, precondition=replace(method.precondition, **changes))


def test_conjugate_gradients_give_the_scores_of_the_dense_solution(
    subject, toy_queries, toy_train, dense, phi, psi, tmp_path
):
    usual = traced(subject, toy_queries, CG, tmp_path, replace(SETTINGS, damping=0.1, phases=2))
    want = dense_scores(dense[0], about(usual)["damping"], psi, phi)
    assert min(spearmanr(a, b).statistic for a, b in zip(usual.values, want, strict=True)) > 0.999
    assert_near(usual.values, want, 1e-4)
    assert_near(usual.phases.sum(1), want, 1e-4)
    assert about(usual)["residual"] <= 1.01e-4 and about(usual)["iterations"] < 100
    # It is no multiple of the products without a curvature.
    plain = (psi @ phi.T).numpy()
    assert min(spearmanr(a, b).statistic for a, b in zip(plain, want, strict=True)) < 0.99


def test_the_manifest_says_what_was_solved(subject, toy_queries, dense, tmp_path):
    scores = traced(subject, toy_queries, CG, tmp_path)
    found = about(scores)
    assert set(found) == {"mean_eigenvalue", "damping", "residual", "iterations"}
    assert found["damping"] == pytest.approx(1.0 * found["mean_eigenvalue"])
    mean = float(torch.diagonal(dense[0]).mean())
    deviation = sum(2 * float((part @ part).trace()) for part in dense[1]) ** 0.5 / len(dense[1]) / len(dense[0])
    assert abs(found["mean_eigenvalue"] - mean) < 3 * deviation
    rows = sorted(keyed_order(0, 0, 10)[:3].tolist())
    assert scores.details["curvature_images"] == [subject.train.ids[row] for row in rows]
    assert any("solved to a relative residual of" in note for note in scores.notes)


@pytest.mark.parametrize("method", [CG, DATA_INF], ids=lambda method: method.name)
def test_under_a_large_damping_what_is_left_is_the_dot_product(subject, toy_queries, phi, psi, tmp_path, method):
    scores = traced(subject, toy_queries, method, tmp_path, replace(SETTINGS, damping=1e9))
    plain = (psi @ phi.T).numpy()
    if method is CG:
        assert_near(scores.values * about(scores)["damping"], plain, 1e-6)
    else:  # the damping differs from parameter to parameter
        assert_near(scores.values, data_inf(subject, psi, phi, 1e9), 1e-9)


def test_scores_do_not_depend_on_the_batch_size(subject, toy_queries, tmp_path):
    few = toy_queries.select([0])
    for method in (CG, SERIES, DATA_INF):
        found = []
        for batch_size in (2, 8, 64):
            settings = replace(SETTINGS, batch_size=batch_size)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # LiSSA's residual
                found.append(traced(subject, few, method, tmp_path / str(batch_size), settings).values)
        # Once it has found the largest eigenvalues, the iteration of conjugate gradients enlarges rounding; both of its
        # solutions have a residual of 1e-4.
        tolerance = 1e-4 if method is CG else 1e-9
        assert_near(found[1], found[0], tolerance)
        assert_near(found[2], found[0], tolerance)


def test_too_few_iterations_are_warned_of(subject, toy_queries, tmp_path):
    with pytest.warns(UserWarning, match=r"reached a relative residual of 0\.\d+ in 2 iterations.*not 0.0001"):
        scores = traced(subject, toy_queries.select([0]), with_precondition(CG, max_iterations=2), tmp_path)
    assert about(scores)["iterations"] == 2
    assert any(f"{about(scores)['residual']:.2g}" in note for note in scores.notes)


def test_lissa_is_the_series_of_its_samples(subject, toy_queries, dense, phi, psi, tmp_path):
    """Written out with dense matrices, the events of each step drawn here once more."""
    with pytest.warns(UserWarning, match="LiSSA left a relative residual of"):
        scores = traced(subject, toy_queries, SERIES, tmp_path)
    damping, scale = about(scores)["damping"], about(scores)["scale"]
    eye = torch.eye(len(dense[0])).double()
    solved = 0
    for repeat in range(2):
        h = psi.clone()
        for step in range(12):
            sample = keyed_order(0, 1 + 12 * repeat + step, 6)[:2]
            g = torch.stack([dense[1][k] for k in sample]).mean(0)
            h = psi + h - h @ (g + damping * eye) / scale
        solved = solved + h / scale / 2
    assert_near(scores.values, (solved @ phi.T).numpy(), 1e-9)
    firsts = [torch.stack([dense[1][k] for k in keyed_order(0, 1 + 12 * r, 6)[:2]]).mean(0) for r in range(2)]
    largest = max(float(torch.linalg.eigvalsh(g)[-1]) for g in firsts)
    assert 0.8 * largest < scale / 1.1 - damping <= largest * (1 + 1e-9)


def test_lissa_of_all_events_is_off_by_its_truncation(subject, toy_queries, dense, phi, psi, tmp_path):
    whole = with_precondition(SERIES, events_per_step=None, depth=60, repeats=1, power_iterations=30)
    scores = traced(subject, toy_queries, whole, tmp_path, replace(SETTINGS, damping=10.0))
    damping, scale = about(scores)["damping"], about(scores)["scale"]
    values, basis = torch.linalg.eigh(dense[0] + damping * torch.eye(len(dense[0])).double())
    assert scale == pytest.approx(1.1 * float(values[-1]), rel=0.01)
    left = (1 - values / scale) ** 61
    want = (((psi @ basis) * (1 - left) / values) @ (phi @ basis).T).numpy()
    assert_near(scores.values, want, 1e-9)
    # The residual that is reported is the largest share of a phase or half that the series lacks.
    assert about(scores)["residual"] <= float(left.max())
    exact = dense_scores(dense[0], damping, psi, phi)
    lacking = (((psi @ basis) * left / values) @ (phi @ basis).T).numpy()
    assert_near(exact - scores.values, lacking, 1e-9)


def test_lissa_that_diverges_is_refused(subject, toy_queries, tmp_path, monkeypatch):
    monkeypatch.setattr("whence.inverse_curvature.SCALE_MARGIN", 0.01)
    whole = with_precondition(SERIES, events_per_step=None, depth=60)
    with pytest.raises(NumericsError, match="LiSSA diverges"):
        traced(subject, toy_queries, whole, tmp_path)


def data_inf(subject, psi, phi, damping=0.1):
    """The formula, with dense inverses where a parameter is small enough."""
    want = 0.0
    for name, span in subject.source(subject.checkpoints[-1], SETTINGS).layout.spans.items():
        g, v = phi[:, span], psi[:, span]
        if name.endswith("to_k.bias"):  # softmax does not see it: its gradient is 0 but for rounding
            assert g.abs().max() < 1e-14
            continue
        d = damping * float(g.square().mean())
        if g.shape[1] <= 80:
            eye = d * torch.eye(g.shape[1]).double()
            solved = torch.stack([torch.linalg.solve(torch.outer(row, row) + eye, v.T).T for row in g]).mean(0)
        else:
            terms = [(v - torch.outer(v @ row, row) / (d + row @ row)) / d for row in g]
            solved = torch.stack(terms).mean(0)
        want = want + solved @ g.T
    return want.numpy()


def test_data_inf_is_its_formula(subject, toy_queries, phi, psi, tmp_path):
    scores = traced(subject, toy_queries, DATA_INF, tmp_path, replace(SETTINGS, damping=None))
    assert_near(scores.values, data_inf(subject, psi, phi, 0.1), 1e-9)
    assert_near(scores.phases.sum(1), scores.values, 1e-9)
    assert about(scores) == {"parameters_left_out": 1}
    # Positive for a proponent: it does not turn the sign of products of one gradient with itself.
    own = data_inf(subject, phi, phi)
    assert (np.diagonal(own) > 0).all()


def test_data_inf_of_all_parameters_with_the_loss_of_training(toy_run, toy_train, toy_queries, tmp_path):
    """Absolute errors: DataInf's matrix is of the loss that was trained on."""
    subject = Subject(list_checkpoints(toy_run), toy_train, Record.open(toy_run / "record"), "l1")
    settings = replace(SETTINGS, parameters=("*",), damping=0.1)
    scores = traced(subject, toy_queries, DATA_INF, tmp_path, settings)
    model, scheduler = load_model(subject.checkpoints[-1], dtype="float64"), load_scheduler(subject.checkpoints[-1])
    phi, psi = (
        torch.stack(
            [
                reference.query_gradients(
                    model, scheduler, images.pixels([k])[0], images.ids[k], t, draws, loss="l1", side=side
                ).mean(0)
                for k in range(len(images))
            ]
        )
        for images, t, draws, side in ((toy_train, 2, 1, "train"), (toy_queries, 4, 2, "query"))
    )
    want, start = 0.0, 0
    for parameter in model.parameters():
        g, v = (x[:, start : start + parameter.numel()] for x in (phi, psi))
        start += parameter.numel()
        if g.abs().max() < 1e-14:
            continue
        d = 0.1 * float(g.square().mean())
        shares = (v @ g.T) / (d + g.square().sum(1))
        want = want + (v - shares @ g / len(g)) @ g.T / d
    assert_near(scores.values, want.numpy(), 1e-8)


@pytest.mark.parametrize("method", [CG, DATA_INF, SERIES], ids=lambda method: method.name)
def test_passes_are_those_that_the_bar_of_the_run_counts(subject, toy_queries, tmp_path, monkeypatch, method):
    bars = []

    def opening(*arguments, **options):
        bars.append(progress_bar(*arguments, **(options | {"shown": True})))
        return bars[-1]

    monkeypatch.setattr(whence.streaming, "progress_bar", opening)
    planned = plan(subject, toy_queries, [method], SETTINGS, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        traced(subject, toy_queries, method, tmp_path)
        assert [bar.n for bar in bars] == [planned.sample_passes] == [bars[0].total]
    curvature = {
        "influence-cg": 6 + 2 * 6 * 101 * 6,  # the trace; each iteration and the residual, 2 vectors a query
        "lissa": 6 + 2 * 5 * 2 * 2 + 2 * 6 * (12 * 2 * 2 + 6),
        "datainf": 20,
    }
    (count,) = planned.passes[0].passes
    assert count.curvature == curvature[method.name]
    assert count.curvature_per_turn == (20 if method is DATA_INF else 0)
    # What the curvature itself costs, it costs once.
    made = list((tmp_path / "cache" / "curvature").iterdir())
    assert len(made) == (2 if method is SERIES else 1)


def test_turns_of_queries_do_not_change_scores(subject, toy_queries, tmp_path, monkeypatch):
    queries = toy_queries.select([0, 1])
    monkeypatch.setattr("whence.memory.QUERY_BYTES", 1)  # one query in each turn
    turns = []
    run_turn = whence.streaming.StreamingPass._run_turn
    monkeypatch.setattr(
        whence.streaming.StreamingPass, "_run_turn", lambda self, *a: turns.append(a) or run_turn(self, *a)
    )
    for method in (CG, DATA_INF):
        one_by_one = traced(subject, queries, method, tmp_path / "turns")
        with monkeypatch.context() as usual:
            usual.setattr("whence.memory.QUERY_BYTES", 2**30)
            together = traced(subject, queries, method, tmp_path / "together")
        assert_near(one_by_one.values, together.values, 1e-9)
        assert about(one_by_one) == about(together) if method is CG else True
    assert len(turns) == 2 * (2 + 1)


@pytest.mark.parametrize("method, kind", [(CG, ConjugateGradients), (DATA_INF, DataInf)], ids=["cg", "datainf"])
def test_solutions_that_took_long_are_not_made_again(subject, toy_queries, tmp_path, monkeypatch, method, kind):
    want = traced(subject, toy_queries.select([0]), method, tmp_path / "whole")
    monkeypatch.setattr("whence.streaming.WORTH_KEEPING_S", 0.0)
    with monkeypatch.context() as killed:
        killed.setattr(whence.streaming.StreamingPass, "_tile", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            traced(subject, toy_queries.select([0]), method, tmp_path / "cut")
    monkeypatch.setattr(kind, "apply_", lambda *a: pytest.fail("it was solved again"))
    found = traced(subject, toy_queries.select([0]), method, tmp_path / "cut")
    assert found.values.tobytes() == want.values.tobytes()
    assert found.details.get("preconditioners") == want.details.get("preconditioners")
    assert not list((tmp_path / "cut" / "cache").rglob("solved-*"))


def test_one_trace_estimate_serves_every_damping_and_both_solvers(subject, toy_queries, tmp_path, monkeypatch):
    first = traced(subject, toy_queries.select([0]), CG, tmp_path)
    monkeypatch.setattr(
        "whence.gauss_newton.GaussNewton.mean_eigenvalue", lambda *a: pytest.fail("it was estimated again")
    )
    other = traced(subject, toy_queries.select([0]), CG, tmp_path, replace(SETTINGS, damping=10.0))
    assert about(other)["damping"] == pytest.approx(10 * about(first)["damping"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        series = traced(subject, toy_queries.select([0]), SERIES, tmp_path)
    assert about(series)["mean_eigenvalue"] == about(first)["mean_eigenvalue"]


@pytest.mark.parametrize(
    "method, match",
    [
        (with_precondition(CG, damping=0.0), "influence-cg: damping must be above 0, found 0.0"),
        (with_precondition(DATA_INF, damping=-1.0), "datainf: damping must be above 0, found -1.0"),
        (with_precondition(CG, tolerance=0.0), "tolerance must be between 0 and 1, found 0.0"),
        (with_precondition(CG, max_iterations=0, num_images=0), "num_images must be above 0.*max_iterations must be"),
        (with_precondition(SERIES, depth=0, events_per_step=0), "depth must be above 0.*events_per_step must be"),
        (
            with_precondition(DATA_INF, events=Grid(5, 2)),
            r"batch_size must hold all events of a training image in the curvature \(10\), found 8",
        ),
    ],
)
def test_settings_that_cannot_be_met_are_refused(subject, toy_queries, tmp_path, method, match):
    with pytest.raises(ConfigError, match=match):
        traced(subject, toy_queries, method, tmp_path, replace(SETTINGS, damping=None))


def test_grad_dot_is_not_touched_by_any_of_it(subject, toy_queries, phi, psi, tmp_path):
    scores = traced(subject, toy_queries, GRAD_DOT, tmp_path, replace(SETTINGS, damping=None))
    assert_near(scores.values, (psi @ phi.T).numpy(), 1e-9)
    assert "preconditioners" not in scores.details
    assert sha256_of_json(scores.details["method"]["precondition"]) == sha256_of_json(None)
