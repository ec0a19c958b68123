"""Networks of diffusers, tiny, against one event at a time; no adapter is needed to take gradients."""

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from engine.contract import loss
from whence.engine.capture import Capture
from whence.engine.check import check_against_autograd
from whence.engine.sinks import DotSink, GatherSink, Layout

NUM_EVENTS = 4

Inputs = dict[str, Tensor]


def normal(*shape: int) -> Tensor:
    return torch.randn(NUM_EVENTS, *shape, dtype=torch.float64)


def timesteps() -> Tensor:
    return torch.tensor([3, 40, 7, 21])


# --- U-Nets

SMALL = {
    "sample_size": 8,
    "in_channels": 2,
    "out_channels": 2,
    "block_out_channels": (4, 8),
    "layers_per_block": 1,
    "norm_num_groups": 2,
}


def unet(**changes: Any) -> tuple[nn.Module, Inputs]:
    settings: dict[str, Any] = {
        **SMALL,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 4,
        "num_train_timesteps": 50,
    }
    model = diffusers.UNet2DModel(**(settings | changes))
    size = model.config.sample_size
    height, width = size if isinstance(size, tuple | list) else (size, size)
    made = {"sample": normal(2, height, width), "timestep": timesteps()}
    if model.config.num_class_embeds:
        made["class_labels"] = torch.tensor([1, 0, 2, 1])
    return model, made


def text_unet(**changes: Any) -> tuple[nn.Module, Inputs]:
    settings: dict[str, Any] = {
        **SMALL,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": 2,
        "cross_attention_dim": 6,
    }
    model = diffusers.UNet2DConditionModel(**(settings | changes))
    return model, {"sample": normal(2, 8, 8), "timestep": timesteps(), "encoder_hidden_states": normal(5, 6)}


# --- transformers


def dit() -> tuple[nn.Module, Inputs]:
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=2,
        num_layers=2,
        sample_size=4,
        patch_size=2,
        num_embeds_ada_norm=5,
        norm_num_groups=2,
    )
    return model, {
        "hidden_states": normal(2, 4, 4),
        "timestep": timesteps(),
        "class_labels": torch.tensor([1, 4, 0, 1]),
    }


def sd3(dual_attention_layers: tuple[int, ...] = (0,)) -> tuple[nn.Module, Inputs]:
    model = diffusers.SD3Transformer2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=2,
        out_channels=2,
        num_layers=2,
        attention_head_dim=4,
        num_attention_heads=2,
        joint_attention_dim=6,
        caption_projection_dim=8,
        pooled_projection_dim=5,
        qk_norm="rms_norm",
        dual_attention_layers=dual_attention_layers,
    )
    return model, {
        "hidden_states": normal(2, 4, 4),
        "timestep": timesteps(),
        "encoder_hidden_states": normal(3, 6),
        "pooled_projections": normal(5),
    }


def flux() -> tuple[nn.Module, Inputs]:
    model = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=6,
        pooled_projection_dim=5,
        guidance_embeds=True,
        axes_dims_rope=(2, 2, 4),
    )
    return model, {
        "hidden_states": normal(6, 4),
        "timestep": timesteps() / 50,
        "guidance": torch.tensor([3.0, 1.0, 3.5, 2.0]),
        "encoder_hidden_states": normal(3, 6),
        "pooled_projections": normal(5),
        # The same for all events, and without an axis of them.
        "img_ids": torch.arange(18).reshape(6, 3).double(),
        "txt_ids": torch.zeros(3, 3).double(),
    }


def pixart() -> tuple[nn.Module, Inputs]:
    model = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=2,
        out_channels=4,
        num_layers=2,
        cross_attention_dim=8,
        sample_size=4,
        patch_size=2,
        caption_channels=6,
        use_additional_conditions=False,
    )
    return model, {"hidden_states": normal(2, 4, 4), "timestep": timesteps(), "encoder_hidden_states": normal(3, 6)}


def sana() -> tuple[nn.Module, Inputs]:
    model = diffusers.SanaTransformer2DModel(
        in_channels=2,
        out_channels=2,
        num_attention_heads=2,
        attention_head_dim=4,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=6,
        sample_size=4,
        patch_size=1,
    )
    return model, {"hidden_states": normal(2, 4, 4), "timestep": timesteps(), "encoder_hidden_states": normal(3, 6)}


# --- ways of using them


class LowRank(nn.Module):
    """What peft puts in the place of a layer: it is frozen, and two trained ones are added to it."""

    def __init__(self, base_layer: nn.Linear, rank: int = 2, scaling: float = 0.5):
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base_layer.in_features, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, base_layer.out_features, bias=False)})
        self.scaling = scaling

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result = self.base_layer(hidden, *args, **kwargs)
        return result + self.lora_B["default"](self.lora_A["default"](hidden)) * self.scaling


def with_adapters(model: nn.Module) -> nn.Module:
    model.requires_grad_(False)
    for path, layer in list(model.named_modules()):
        if path.endswith(("to_q", "to_v")):
            model.set_submodule(path, LowRank(layer))
    return model


def checkpointed(model: Any) -> nn.Module:
    model.enable_gradient_checkpointing()
    return model.train()  # only then is it in force; no dropout is on


def fused(model: Any) -> nn.Module:
    model.fuse_qkv_projections()
    return model


def channels_last(model: nn.Module) -> nn.Module:
    return model.to(memory_format=torch.channels_last)


def plain_attention(model: Any) -> nn.Module:
    model.set_attn_processor(diffusers.models.attention_processor.AttnProcessor())
    return model


def sliced_attention(model: Any) -> nn.Module:
    model.set_attention_slice(1)
    return model


Made = Callable[[], tuple[nn.Module, Inputs]]
Change = Callable[[Any], nn.Module]
MODELS: dict[str, tuple[Made, Change | None]] = {
    "unet": (unet, None),
    "unet, scale and shift": (lambda: unet(resnet_time_scale_shift="scale_shift"), None),
    "unet, classes": (lambda: unet(num_class_embeds=3), None),
    "unet, odd sizes": (lambda: unet(sample_size=(10, 14)), None),
    "unet, residual sampling": (lambda: unet(downsample_type="resnet", upsample_type="resnet"), None),
    "unet, channels last": (unet, channels_last),
    "unet, checkpointed": (unet, checkpointed),
    "unet, adapters": (unet, with_adapters),
    "text unet": (text_unet, None),
    "text unet, fused": (text_unet, fused),
    "text unet, plain attention": (text_unet, plain_attention),
    "text unet, sliced attention": (text_unet, sliced_attention),
    "text unet, checkpointed": (text_unet, checkpointed),
    "text unet, channels last": (lambda: text_unet(use_linear_projection=True), channels_last),
    "text unet, adapters": (text_unet, with_adapters),
    "text unet, adapters, checkpointed": (text_unet, lambda model: checkpointed(with_adapters(model))),
    "dit": (dit, None),
    "sd3": (sd3, None),
    "sd3, fused": (lambda: sd3(dual_attention_layers=()), fused),
    "sd3, checkpointed": (sd3, checkpointed),
    "sd3, adapters": (sd3, with_adapters),
    "flux": (flux, None),
    "flux, checkpointed": (flux, checkpointed),
    "pixart": (pixart, None),
    "pixart, checkpointed": (pixart, checkpointed),
    "sana": (sana, None),
}


def build(name: str) -> tuple[nn.Module, Inputs]:
    torch.manual_seed(0)
    make, change = MODELS[name]
    model, made = make()
    model = model.eval()
    model = (change(model) if change else model).double()
    for parameter in model.parameters():
        # What starts at zero, as the last layer of a block does, would hide what comes before it.
        nn.init.normal_(parameter, std=0.3)
    return model, made


def make_outputs(model: nn.Module, made: Inputs) -> Callable[[slice], Tensor]:
    def outputs(some: slice) -> Tensor:
        batch = {name: tensor if name.endswith("_ids") else tensor[some] for name, tensor in made.items()}
        return loss(model(**batch, return_dict=False)[0])

    return outputs


CUDA = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
)


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("name", list(MODELS))
def test_gradients_are_those_of_one_event_at_a_time(name: str, device: str):
    model, made = build(name)
    model, made = model.to(device), {name: tensor.to(device) for name, tensor in made.items()}
    outputs = make_outputs(model, made)
    capture = Capture(model)
    layout = Layout.of(capture.parameters)
    parameters = list(capture.parameters.values())
    events = []
    for event in range(NUM_EVENTS):
        gradients = torch.autograd.grad(outputs(slice(event, event + 1)), parameters, materialize_grads=True)
        events.append(torch.cat([gradient.flatten() for gradient in gradients]))
    for num_units in (NUM_EVENTS, NUM_EVENTS // 2):
        want = torch.stack(events).unflatten(0, (num_units, -1)).sum(1)
        sink = GatherSink(layout, torch.zeros_like(want))
        dots = DotSink(layout, want[:1], num_units)
        capture.run(outputs, NUM_EVENTS, num_units, [sink, dots])
        # Sana's attention is in float32 whatever the model's type; on a GPU it depends on the batch by as much.
        rtol = 1e-4 if (name, device) == ("sana", "cuda") else RTOL
        check_rows(layout, sink.rows, want, rtol)
        torch.testing.assert_close(dots.norm_squared, want.square().sum(1), rtol=rtol, atol=0.0)
        torch.testing.assert_close(dots.dots[:, 0], want @ want[0], rtol=rtol, atol=rtol * float(want[0].norm()) ** 2)
    assert not capture.uncovered
    assert all(p.grad is None for p in parameters) and all(p.requires_grad for p in parameters)


RTOL = 1e-9
"""float64, some ten layers deep."""


def check_rows(layout: Layout, found: Tensor, want: Tensor, rtol: float = RTOL) -> None:
    """Compare parameter by parameter; some of the gradients are zero in exact arithmetic."""
    for name, span in layout.spans.items():
        error, length = (found - want)[:, span].norm(dim=1), want[:, span].norm(dim=1)
        assert (error <= rtol * length + 1e-3 * rtol * want.norm(dim=1)).all(), name


@pytest.mark.parametrize("name", ["unet, classes", "text unet, adapters, checkpointed", "sd3", "pixart"])
def test_the_check_passes(name: str):
    model, made = build(name)
    check_against_autograd(Capture(model), make_outputs(model, made), NUM_EVENTS, NUM_EVENTS)


@pytest.mark.parametrize("name", ["unet", "text unet, adapters", "sd3, checkpointed", "pixart", "dit"])
def test_the_check_passes_under_autocast(name: str):
    model, made = build(name)
    made = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in made.items()}
    outputs = make_outputs(model.to(torch.float32), made)

    def rounded(some: slice) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return outputs(some)

    capture = Capture(model)
    check_against_autograd(capture, rounded, NUM_EVENTS, NUM_EVENTS)
    assert capture.arithmetic == torch.bfloat16
