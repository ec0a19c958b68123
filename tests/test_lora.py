"""LoRA checkpoints: every form in which they are saved opens, and what does not fit is refused."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from engine.contract import loss
from lora_models import (
    NETWORKS,
    add_adapters,
    conditions,
    draw_weights,
    make_base,
    part_of,
    save_diffusers,
    save_peft,
)
from whence.checkpoints import list_checkpoints, load_model
from whence.diffusion.adapters import predict
from whence.engine.capture import Capture
from whence.engine.sinks import DotSink, GatherSink, Layout

NUM_EVENTS = 4
FILE = "pytorch_lora_weights.safetensors"
RTOL = 1e-9
"""float64, some ten layers deep."""


def inputs() -> tuple[Tensor, Tensor]:
    drawn = torch.Generator().manual_seed(3)
    noisy = torch.randn(NUM_EVENTS, 4, 8, 8, generator=drawn, dtype=torch.float64)
    return noisy, torch.tensor([3, 40, 7, 21])


def output(model: Any) -> Tensor:
    with torch.no_grad():
        return predict(model, *inputs(), conditions(NUM_EVENTS))


def save(how: str, network: str, folder: Path, **settings: Any) -> Any:
    """Save a base in ``base`` and its LoRA in ``lora``, one way or another, and give the model that has both."""
    base = make_base(network, folder / "base")
    adapted = copy.deepcopy(base)
    config = add_adapters(adapted, seed=1, **settings)
    if how == "peft":
        save_peft(base, config, adapted, folder / "lora")
    elif how == "peft, in a folder of the network":
        save_peft(base, config, adapted, folder / "lora" / part_of(network))
    elif how == "save_lora_adapter":
        adapted.peft_config = {"default": config}
        adapted.save_lora_adapter(folder / "lora")
    else:
        names, _, metadata = how.partition(", ")
        save_diffusers(adapted, config, folder / "lora", network, names=names, metadata=metadata == "metadata")
    return adapted.double()


def edit(folder: Path, change: Any, metadata: dict[str, str] | None = None) -> None:
    """Rewrite the file of a LoRA; ``change`` alters the dict of tensors in place."""
    state = load_file(folder / FILE)
    change(state)
    save_file(state, folder / FILE, metadata)


def open_lora(folder: Path, **more: Any) -> Any:
    (checkpoint,) = list_checkpoints(folder / "lora", base=folder / "base", **more)
    return load_model(checkpoint, dtype="float64")


HOW = ["peft, metadata", "diffusers, metadata", "peft", "peft, in a folder of the network", "save_lora_adapter"]


def check_gradients(model: nn.Module, outputs: Any) -> Capture:
    """Compare the per-sample gradients of what is trainable with autograd's, event by event."""
    capture = Capture(model)
    layout, parameters = Layout.of(capture.parameters), list(capture.parameters.values())
    events = []
    for event in range(NUM_EVENTS):
        gradients = torch.autograd.grad(outputs(slice(event, event + 1)), parameters, materialize_grads=True)
        events.append(torch.cat([gradient.flatten() for gradient in gradients]))
    want = torch.stack(events)
    sink, dots = GatherSink(layout, torch.zeros_like(want)), DotSink(layout, want[:2], NUM_EVENTS)
    capture.run(outputs, NUM_EVENTS, NUM_EVENTS, [sink, dots])
    for name, span in layout.spans.items():
        error, length = (sink.rows - want)[:, span].norm(dim=1), want[:, span].norm(dim=1)
        assert (error <= RTOL * length + 1e-3 * RTOL * want.norm(dim=1)).all(), name
    torch.testing.assert_close(dots.norm_squared, want.square().sum(1), rtol=RTOL, atol=0.0)
    torch.testing.assert_close(dots.dots, want @ want[:2].T, rtol=RTOL, atol=RTOL * float(want.norm()) ** 2)
    return capture


def outputs_of(model: Any) -> Any:
    noisy, times = inputs()
    told = conditions(NUM_EVENTS)

    def outputs(some: slice) -> Tensor:
        return loss(predict(model, noisy[some], times[some], {name: value[some] for name, value in told.items()}))

    return outputs


class TestOpening:
    @pytest.mark.parametrize("how", HOW)
    @pytest.mark.parametrize("network", list(NETWORKS))
    def test_a_lora_computes_what_it_was_trained_to(self, network: str, how: str, tmp_path: Path):
        trained = save(how, network, tmp_path, rank_pattern={"to_k": 3}, alpha_pattern={"to_v": 5})
        model = open_lora(tmp_path)
        assert type(model) is type(trained) and not model.training
        torch.testing.assert_close(output(model), output(trained), rtol=1e-12, atol=1e-12)
        adapters = {name for name, p in model.named_parameters() if p.requires_grad}
        assert adapters == {name for name, _ in trained.named_parameters() if ".lora_" in name}
        base = NETWORKS[network]()
        draw_weights(base, seed=0)
        assert float((output(base.double().eval()) - output(model)).abs().max()) > 1e-3  # the adapters count

    def test_alphas_of_a_file(self, tmp_path: Path):
        trained = save("diffusers, none", "sd", tmp_path)
        alphas = {
            f"{key.partition('.lora.')[0]}.alpha": torch.tensor(3.0) for key in load_file(tmp_path / "lora" / FILE)
        }
        edit(tmp_path / "lora", lambda state: state.update(alphas))
        torch.testing.assert_close(output(open_lora(tmp_path)), output(trained), rtol=1e-12, atol=1e-12)
