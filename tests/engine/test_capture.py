"""What capture does to a model, and what it refuses; then whole networks against the batch-of-one reference."""

import weakref
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from engine.contract import KeepFactors, batch_of_one, loss
from engine.small_models import Model, check, check_equal, gather, inputs, two_layers, warned
from reference import gradient
from whence.diffusion.adapters import check_model, needed_conditions, predict
from whence.diffusion.objectives import sample_loss
from whence.diffusion.process import NoiseProcess
from whence.engine._base import AbstractLayerFactors
from whence.engine.capture import AbstractSink, Capture
from whence.engine.check import check_against_autograd
from whence.engine.sinks import GatherSink, Layout
from whence.errors import ConfigError, UnsupportedModelError

# --- the model is left as it was


def state_of(model: nn.Module) -> tuple[list[bool], list[Tensor | None], int]:
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()]
    parameters = list(model.parameters())
    return [p.requires_grad for p in parameters], [p.grad for p in parameters], sum(hooks)


def test_the_model_is_left_as_it_was():
    model = two_layers()
    model.first.bias.requires_grad_(False)
    before = state_of(model)
    data = inputs(3, 3)

    def outputs(some: slice) -> Tensor:
        assert not any(p.requires_grad for p in model.parameters())
        return loss(model(data[some]))

    Capture(model, ["last.*"]).run(outputs, 3, 3, [])
    assert state_of(model) == before == ([True, False, True, True], [None] * 4, 0)


def test_gradients_of_a_training_loop_are_kept():
    model = two_layers()
    loss(model(inputs(2, 3))).sum().backward()
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    gather(model, inputs(3, 3), 3)
    check(model, inputs(3, 3))
    assert all(torch.equal(p.grad, b) for p, b in zip(model.parameters(), before, strict=True) if p.grad is not None)


class FailsToConsume(AbstractSink):
    def __init__(self, of: type[nn.Module]):
        self.of = of

    def consume(self, factors: AbstractLayerFactors, names: dict[str, str]):
        if isinstance(factors.layer, self.of):
            raise RuntimeError("no disk")


@pytest.mark.parametrize("where", ["forward", "backward", "sink", "unit", "sink of units"])
def test_the_model_is_left_as_it_was_after_an_exception(where: str):
    model = two_layers()
    if "unit" in where:
        model.tied = nn.Linear(3, 4).double()
        model.tied.weight = model.first.weight
        model.run = lambda m, x: m.last((m.first(x) * m.tied(x)).tanh())
    before = state_of(model)
    capture, sink, data = warned(Capture, model) if "unit" in where else Capture(model), KeepFactors(), inputs(3, 3)

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    def outputs(some: slice) -> Tensor:
        values = model(data[some])
        if where == "forward" or (where == "unit" and len(values) == 1):
            fail()
        if where == "backward":
            values.register_hook(fail)
        return loss(values)

    sinks = [FailsToConsume(of=nn.Linear if where == "sink" else Model)] if "sink" in where else []
    with pytest.raises(RuntimeError, match="no disk|out of memory"):
        capture.run(outputs, 3, 3, sinks)
    assert state_of(model) == before
    # ... and nothing of the broken pass is left in the capture
    data = data[:2]
    capture.run(lambda some: loss(model(data[some])), 2, 2, [sink])
    want = batch_of_one(model, data, 2)
    for factors, names in sink.found:
        check_equal({names[own]: factors.gradients[own] for own in names}, {n: want[n] for n in names.values()})
    assert sum(len(names) for _, names in sink.found) == len(want)


# --- which parameters


def test_parameters_by_pattern():
    model = two_layers()
    data = inputs(4, 3)
    found = gather(model, data, 4, ("last.weight", "*.bias"))
    want = batch_of_one(model, data, 4)
    check_equal(found, {name: want[name] for name in ("first.bias", "last.weight", "last.bias")})


def test_frozen_parts_are_left_out():
    model = two_layers()
    model.first.requires_grad_(False)
    model.last.bias.requires_grad_(False)
    data = inputs(4, 3)
    found = gather(model, data, 4)
    assert list(found) == ["last.weight"]
    check_equal(found, batch_of_one(model, data, 4))


def test_the_backward_pass_ends_at_the_first_captured_layer():
    def run(m: Any, x: Tensor):
        middle = m.first(x).tanh()
        assert not middle.requires_grad  # so nothing before the last layer has a part in the backward pass
        return m.last(middle)

    model = Model(run, first=nn.Linear(3, 4), last=nn.Linear(4, 2))
    data = inputs(4, 3)
    found = gather(model, data, 4, ("last.*",))
    model.first.requires_grad_(False)
    check_equal(found, batch_of_one(model, data, 4))


def test_a_pattern_without_effect_is_refused():
    with pytest.raises(ConfigError, match=r"matches 'frist\.\*'. The model has 4 trainable parameters: first.weight"):
        Capture(two_layers(), ["last.*", "frist.*"])
    with pytest.raises(ConfigError, match="has 0 trainable parameters"):
        Capture(two_layers().requires_grad_(False))


# --- layers that are refused


def test_all_uncovered_parameters_are_listed_in_one_error():
    model = Model(
        lambda m, x: x,
        one=nn.Linear(3, 3, bias=False),
        two=nn.Linear(3, 3),
        scale=nn.Parameter(torch.ones(3)),
        shift=nn.Parameter(torch.ones(3)),
        fine=nn.Linear(3, 3),
    )
    model.two.weight = model.one.weight
    model.shift = model.scale
    with pytest.raises(UnsupportedModelError) as caught:
        Capture(model, uncovered="refuse")
    for part in (
        "GroupNorm, LayerNorm, RMSNorm, Embedding, with the events on the first axis",
        "scale (shared by Model at the top and Model at the top)",
        "one.weight (shared by Linear at one and Linear at two)",
    ):
        assert part in str(caught.value)
    assert "fine" not in str(caught.value) and "two.bias" not in str(caught.value)


def test_what_a_pass_finds_uncovered_is_refused_too():
    model = Model(lambda m, x: m.last(x) + m.first(x[:1]), first=nn.Linear(3, 2), last=nn.Linear(3, 2))
    capture = Capture(model, uncovered="refuse")
    with pytest.raises(
        UnsupportedModelError, match=r"Not covered: first\.weight \(its layer saw a batch of 1, not of 4"
    ):
        capture.run(lambda some: loss(model(inputs(4, 3))), 4, 4, [])


def test_unknown_layers_that_are_frozen_or_not_chosen_do_not_matter():
    model = Model(
        lambda m, x: m.last(F.batch_norm(x, m.norm.running_mean, m.norm.running_var) * m.scale),
        norm=nn.BatchNorm1d(3).requires_grad_(False),
        scale=nn.Parameter(torch.ones(3)),
        last=nn.Linear(3, 2),
    )
    data = inputs(3, 3)
    want = batch_of_one(model, data, 3)
    check_equal(gather(model, data, 3, ("last.*",)), {n: want[n] for n in ("last.weight", "last.bias")})


@pytest.mark.parametrize("running", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_batch_normalisation_over_the_batch_is_refused(running: bool, frozen: bool):
    norm = nn.BatchNorm1d(3, track_running_stats=running).requires_grad_(not frozen)
    model = Model(lambda m, x: m.last(m.norm(x)), norm=norm, last=nn.Linear(3, 2)).train(running)
    with pytest.raises(UnsupportedModelError, match=r"batch normalisation mixes .* at norm. Put the model into eval"):
        Capture(model).run(lambda some: loss(model(inputs(4, 3))), 4, 4, [])


def test_an_input_changed_in_place_afterwards_is_refused():
    def run(m: Any, x: Tensor):
        middle = m.first(x)
        after = m.last(middle)
        middle.mul_(2)
        return after + middle

    model = Model(run, first=nn.Linear(3, 3), last=nn.Linear(3, 3))
    with pytest.raises(
        UnsupportedModelError, match=r"input of the layer of last\.weight, last\.bias was changed in place"
    ):
        gather(model, inputs(4, 3), 4)


@pytest.mark.parametrize("times", [1, 2])
def test_gradient_checkpointing_of_the_old_kind_is_refused(times: int):
    """It has a backward pass of its own; two calls would each have a norm of their own."""

    def run(m: Any, x: Tensor):
        y = m.first(x).tanh()
        for _ in range(times):
            y = checkpoint(m.last, y, use_reentrant=True)
        return y

    model = Model(run, first=nn.Linear(3, 3), last=nn.Linear(3, 3))
    with pytest.raises(UnsupportedModelError, match=r"layer of last\.weight, last\.bias and .* use_reentrant=False"):
        gather(model, inputs(4, 3), 4)


# --- layers that are used in unusual ways


def call_twice(m: Any, x: Tensor):
    return m.last(m.conv(x).mean((2, 3)) + m.conv(x[..., ::2, 1:].tanh()).square().mean((2, 3)))


def with_unused_output(m: Any, x: Tensor):
    m.conv(x)
    m.last(x.mean((2, 3)))
    return m.last(m.conv(x.tanh()).mean((2, 3)))


def never_used(m: Any, x: Tensor):
    m.conv(x)
    return m.last(x.mean((2, 3)))


def fed_by_a_constant(m: Any, x: Tensor):
    time = torch.arange(len(x) * 2, dtype=x.dtype).reshape(-1, 2, 1, 1).expand(-1, -1, 3, 3)
    return m.last(m.conv(time).add_(x[..., :3, :3]).mean((2, 3)))


def changed_in_place(m: Any, x: Tensor):
    y = m.conv(x)
    y += F.relu_(m.conv(x.cos()))
    return m.last(y.mean((2, 3))).mul_(3)


def with_keyword(m: Any, x: Tensor):
    return m.last(input=m.conv(input=x).mean((2, 3)))


def with_no_grad_between(m: Any, x: Tensor):
    with torch.no_grad():
        offset = m.last(m.conv(x).mean((2, 3)))
    return m.last(m.conv(x).sin().mean((2, 3))) + offset


def checkpointed(m: Any, x: Tensor):
    y = checkpoint(m.conv, x, use_reentrant=False)
    y = checkpoint(lambda z: m.conv(z.sin()).exp(), y, use_reentrant=False)
    return m.last(y.mean((2, 3)))


@pytest.mark.parametrize(
    "run",
    [
        call_twice,
        with_unused_output,
        never_used,
        fed_by_a_constant,
        changed_in_place,
        with_keyword,
        with_no_grad_between,
        checkpointed,
    ],
    ids=lambda run: run.__name__,
)
@pytest.mark.parametrize("num_units", [4, 2])
def test_gradients_are_right_however_a_layer_is_used(run: Callable[..., Tensor], num_units: int):
    model = Model(run, conv=nn.Conv2d(2, 2, 3, padding=1), last=nn.Linear(2, 3))
    data = inputs(4, 2, 4, 5)
    data[:] = data[:1] if run is with_no_grad_between else data  # what is under no_grad must not depend on the batch
    if run is fed_by_a_constant:  # the constants differ by event, so a batch of one has others
        check_sum(model, data)
        return
    if run is never_used:
        model.conv.requires_grad_(False)
        want = batch_of_one(model, data, num_units)
        model.conv.requires_grad_(True)
        found = gather(model, data, num_units)
        assert not found.pop("conv.weight").any() and not found.pop("conv.bias").any()
        check_equal(found, want)
    else:
        check_equal(gather(model, data, num_units), batch_of_one(model, data, num_units))
        check(model, data)


def test_gradient_checkpointing_frees_what_the_layers_saw():
    seen = []

    def block(m: Any, x: Tensor) -> Tensor:
        middle = m.first(x).tanh()
        seen.append(weakref.ref(middle))
        return m.last(middle).sin()

    def run(m: Any, x: Tensor) -> Tensor:
        y = checkpoint(block, m, x, use_reentrant=False)
        y = checkpoint(block, m, y, use_reentrant=False)
        assert torch.is_grad_enabled() and seen[0]() is None and seen[1]() is None
        return y

    model = Model(run, first=nn.Linear(3, 3), last=nn.Linear(3, 3))
    data = inputs(4, 3)
    check_equal(gather(model, data, 4), batch_of_one(model, data, 4))


def check_sum(model: nn.Module, data: Tensor) -> None:
    want = torch.autograd.grad(loss(model(data)).sum(), list(model.parameters()))
    found = {name: rows.sum(0) for name, rows in gather(model, data, len(data)).items()}
    check_equal(found, dict(zip(found, want, strict=True)))


def test_a_capture_may_be_used_again_and_again():
    model, data = two_layers(), inputs(6, 3)
    capture = Capture(model)
    for size in (4, 2):
        sink = KeepFactors()
        capture.run(lambda some: loss(model(data[some])), size, size, [sink])
        want = batch_of_one(model, data[:size], size)
        assert len(sink.found) == 2
        for factors, names in sink.found:
            check_equal({names[own]: g for own, g in factors.gradients.items()}, {n: want[n] for n in names.values()})


# --- networks of diffusers


def unet(**changes: Any) -> Any:
    settings: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (8, 8),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "norm_num_groups": 4,
        "attention_head_dim": 4,
        "num_train_timesteps": 50,
    }
    torch.manual_seed(0)
    return diffusers.UNet2DModel(**(settings | changes)).double().eval()


PLAIN_BLOCKS = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}

UNETS = {
    "plain": PLAIN_BLOCKS,
    "attention": {},
    "several heads": {"attention_head_dim": 2},
    "scale and shift": {"resnet_time_scale_shift": "scale_shift"},
    "no attention in the middle": {"add_attention": False, **PLAIN_BLOCKS},
    "no middle": {"mid_block_type": None},
    "residual sampling": {"downsample_type": "resnet", "upsample_type": "resnet"},
    "skip blocks": {
        "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"),
        "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D"),
        "block_out_channels": (32, 32),  # skip blocks have 32 groups where there are enough channels
        "norm_num_groups": 8,
    },
    "one group": {"norm_num_groups": 1},
    "groups as channels": {"norm_num_groups": 8},
    "attention norm": {"attn_norm_num_groups": 2},
    "widths and blocks": {"block_out_channels": (8, 12), "layers_per_block": 2},
    "oblong": {"sample_size": (10, 14)},
    "learned time": {"time_embedding_type": "learned"},
    "fourier time": {"time_embedding_type": "fourier"},
    "one channel": {"in_channels": 1, "out_channels": 1},
    "centred": {"center_input_sample": True, "flip_sin_to_cos": False, "freq_shift": 1},
    "scaled": {"mid_block_scale_factor": 2.0, "downsample_padding": 0, "act_fn": "gelu"},
    "gradient checkpointing": {},
}


@pytest.mark.parametrize("name", list(UNETS))
def test_unets_have_the_gradients_of_one_event_at_a_time(name: str):
    model = unet(**UNETS[name])
    if name == "gradient checkpointing":
        model.enable_gradient_checkpointing()
        model.train()  # only then is it in force; there is no dropout
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=50)
    process = NoiseProcess.from_scheduler(scheduler)
    check_model(model)
    size = model.config.sample_size
    height, width = size if isinstance(size, tuple | list) else (size, size)
    clean, noise = inputs(2, 2, model.config.in_channels, height, width).unbind()
    timesteps = torch.tensor([3, 40])
    capture = Capture(model)
    assert len(capture.parameters) == len([p for p in model.parameters() if p.requires_grad])

    def outputs(some: slice) -> Tensor:
        noisy = process.add_noise(clean[some], noise[some], timesteps[some])
        return sample_loss(predict(model, noisy, timesteps[some]), noise[some], "mse")

    layout = Layout.of(capture.parameters)
    sink = GatherSink(layout, clean.new_zeros(2, layout.num_params))
    capture.run(outputs, 2, 2, [sink])
    check_against_autograd(capture, outputs, 2, 2)
    for event in range(2):
        want = gradient(model, scheduler, clean[event], int(timesteps[event]), noise[event])
        error = float((sink.rows[event] - want).norm() / want.norm())
        assert error < 1e-10  # float64, some ten layers deep


def test_classes_are_told_by_number_and_not_by_vectors():
    for kind in (None, "timestep"):
        model = unet(class_embed_type=kind, num_class_embeds=4 if kind is None else None)
        check_model(model)
        assert needed_conditions(model) == ("class_labels",)
    with pytest.raises(UnsupportedModelError, match="class_embed_type='identity': it is given vectors"):
        check_model(unet(class_embed_type="identity"))
