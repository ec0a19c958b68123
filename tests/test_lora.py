"""LoRA checkpoints: every form in which they are saved opens, and what does not fit is refused."""

import copy
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from engine.contract import loss
from lora_models import (
    NETWORKS,
    UNET,
    add_adapters,
    conditions,
    draw_weights,
    make_base,
    part_of,
    save_diffusers,
    save_peft,
)
from whence.checkpoints import check_files, list_checkpoints, load_model, load_scheduler, save_checkpoint
from whence.diffusion.adapters import predict
from whence.engine.capture import Capture
from whence.engine.check import check_against_autograd
from whence.engine.sinks import DotSink, GatherSink, Layout
from whence.errors import CheckpointError, ConfigError, NumericsError

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


def check_gradients(model: nn.Module, outputs: Any, patterns: Sequence[str] = ("*",)) -> Capture:
    """Compare the per-sample gradients of what is trainable with autograd's, event by event."""
    capture = Capture(model, patterns)
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

    def test_an_alpha_that_nothing_says_is_the_rank_with_a_warning(self, tmp_path: Path):
        trained = save("diffusers, none", "sd", tmp_path, lora_alpha=2)
        with pytest.warns(UserWarning, match=f"{FILE} does not say the alpha .* taken to be the rank.* --lora-alpha"):
            model = open_lora(tmp_path)
        torch.testing.assert_close(output(model), output(trained), rtol=1e-12, atol=1e-12)

    def test_an_alpha_that_the_user_says(self, tmp_path: Path):
        trained = save("peft, none", "sd3", tmp_path, lora_alpha=7)
        torch.testing.assert_close(output(open_lora(tmp_path, lora_alpha=7.0)), output(trained), rtol=1e-12, atol=1e-12)
        hashes = {
            c.content_hash()
            for a in (7.0, 8.0)
            for c in list_checkpoints(tmp_path / "lora", base=tmp_path / "base", lora_alpha=a)
        }
        assert len(hashes) == 2

    def test_an_alpha_that_contradicts_the_file(self, tmp_path: Path):
        save("peft, metadata", "sd", tmp_path)
        with pytest.raises(CheckpointError, match=r"its alpha is 3; --lora-alpha 4 contradicts it"):
            open_lora(tmp_path, lora_alpha=4.0)

    def test_old_attention_processors(self, tmp_path: Path):
        """As the scripts of 2023 named them."""
        trained = save("diffusers, none", "sd", tmp_path, lora_alpha=2)
        old = {"to_out.0.lora": "processor.to_out_lora"} | {
            f"{n}.lora": f"processor.{n}_lora" for n in ("to_q", "to_k", "to_v")
        }

        def rename(state: dict[str, Tensor]):
            for key in list(state):
                new = next(key.replace(a, b) for a, b in old.items() if a in key)
                state[new] = state.pop(key)

        edit(tmp_path / "lora", rename)
        model = open_lora(tmp_path, lora_alpha=2.0)
        torch.testing.assert_close(output(model), output(trained), rtol=1e-12, atol=1e-12)

    def test_names_that_a_compiled_or_distributed_model_had(self, tmp_path: Path):
        trained = save("peft, metadata", "sd", tmp_path)

        def rename(state: dict[str, Tensor]):
            for key in list(state):
                new = key.replace("unet.", "unet.module._orig_mod.").replace(".weight", ".default.weight")
                state[new] = state.pop(key)

        edit(tmp_path / "lora", rename)
        model = open_lora(tmp_path, lora_alpha=3.0)
        torch.testing.assert_close(output(model), output(trained), rtol=1e-12, atol=1e-12)

    @pytest.mark.filterwarnings("ignore:.*LoRA tensor.*have invalid shape")  # peft's, when it saves a bias
    @pytest.mark.parametrize("settings", [{"use_rslora": True}, {"lora_bias": True}, {"lora_dropout": 0.5}])
    def test_forms_of_lora(self, settings: dict[str, Any], tmp_path: Path):
        layers = {"target_modules": ["to_out.0"]} if "lora_bias" in settings else {}
        trained = save("peft, metadata", "sd", tmp_path, **settings, **layers)
        torch.testing.assert_close(output(open_lora(tmp_path)), output(trained.eval()), rtol=1e-12, atol=1e-12)


class TestSaving:
    @pytest.mark.parametrize("network", ["sd", "flux"])
    def test_the_adapters_of_a_training_loop(self, network: str, tmp_path: Path):
        adapted = make_base(network, tmp_path / "base")
        config = add_adapters(adapted, seed=1, alpha_pattern={"to_v": 5})
        adapted.peft_config = {"default": config}
        checkpoint = save_checkpoint(tmp_path / "run" / "checkpoints", 3, adapted, diffusers.DDPMScheduler())
        assert {f.name for f in checkpoint.folder.iterdir()} == {FILE, "scheduler", "checkpoint.json"}
        (found,) = list_checkpoints(tmp_path / "run", base=tmp_path / "base")
        check_files(found)
        assert found.step == 3 and type(load_scheduler(found)) is diffusers.DDPMScheduler
        torch.testing.assert_close(output(load_model(found, dtype="float64")), output(adapted.double()))
        again = make_base(network, tmp_path / "base").eval()  # diffusers opens it too, settings and all
        again.load_lora_adapter(checkpoint.folder, prefix=part_of(network), weight_name=FILE, use_safetensors=True)
        torch.testing.assert_close(output(again.double()), output(adapted))
        edit(checkpoint.folder, lambda state: next(iter(state.values())).zero_())
        with pytest.raises(CheckpointError, match="was altered"):
            check_files(found)

    def test_the_adapters_of_a_peft_model(self, tmp_path: Path):
        torch.manual_seed(0)
        wrapped = get_peft_model(make_base("sd", tmp_path / "base"), LoraConfig(r=2, target_modules=["to_q"]))
        for name, parameter in wrapped.named_parameters():
            if ".lora_B" in name:
                nn.init.normal_(parameter)
        save_checkpoint(tmp_path, 3, wrapped, diffusers.DDPMScheduler())
        (found,) = list_checkpoints(tmp_path, base=tmp_path / "base")
        torch.testing.assert_close(
            output(load_model(found, dtype="float64")), output(wrapped.base_model.model.double().eval())
        )

    def test_what_cannot_be_kept(self, tmp_path: Path):
        adapted = make_base("sd", tmp_path)
        adapted.peft_config = {"one": LoraConfig()}
        with pytest.raises(CheckpointError, match="No moving average is kept of a LoRA"):
            save_checkpoint(tmp_path, 3, adapted, diffusers.DDPMScheduler(), ema=object())
        adapted.peft_config["two"] = LoraConfig()
        with pytest.raises(CheckpointError, match="holds one adapter; this model has one, two"):
            save_checkpoint(tmp_path, 3, adapted, diffusers.DDPMScheduler())


class TestGradients:
    @pytest.mark.parametrize("network", list(NETWORKS))
    @pytest.mark.parametrize("how", ["peft, metadata", "peft"])
    def test_of_the_adapters_alone(self, network: str, how: str, tmp_path: Path):
        save(how, network, tmp_path)
        model = open_lora(tmp_path)
        capture = check_gradients(model, outputs_of(model))
        assert not capture.uncovered
        assert all(".lora_" in name for name in capture.parameters)
        assert {name for name, p in model.named_parameters() if p.requires_grad} == set(capture.parameters)

    def test_under_gradient_checkpointing(self, tmp_path: Path):
        save("peft, metadata", "sd", tmp_path)
        model = open_lora(tmp_path)
        model.enable_gradient_checkpointing()
        assert not check_gradients(model.train(), outputs_of(model)).uncovered

    @pytest.mark.parametrize("network", ["sd", "sd3"])
    def test_under_autocast(self, network: str, tmp_path: Path):
        save("peft, metadata", network, tmp_path)
        model, (noisy, times) = open_lora(tmp_path).float(), inputs()
        told = conditions(NUM_EVENTS, torch.float32)

        def outputs(some: slice) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                made = predict(model, noisy[some].float(), times[some], {n: v[some] for n, v in told.items()})
            return loss(made.float())

        capture = Capture(model)
        check_against_autograd(capture, outputs, NUM_EVENTS, NUM_EVENTS)
        assert capture.arithmetic == torch.bfloat16 and not capture.uncovered

    def test_of_convolutions(self, tmp_path: Path):
        save("peft, metadata", "sd", tmp_path, target_modules=["conv1", "conv2", "conv_shortcut", "conv", "proj_in"])
        model = open_lora(tmp_path)
        capture = check_gradients(model, outputs_of(model))
        assert not capture.uncovered
        assert any(p.ndim == 4 and p.shape[2] == 3 for p in capture.parameters.values())

    @pytest.mark.parametrize("layers", [["to_q", "to_out.0"], ["conv1"]])
    def test_of_dora(self, layers: list[str], tmp_path: Path):
        trained = save("peft, metadata", "sd", tmp_path, use_dora=True, target_modules=layers)
        model = open_lora(tmp_path)
        torch.testing.assert_close(output(model), output(trained), rtol=1e-12, atol=1e-12)
        with pytest.warns(UserWarning, match=r"exact and slow.*lora_magnitude_vector"):
            capture = check_gradients(model, outputs_of(model))
        assert all("lora_magnitude_vector" in name for name in capture.uncovered)

    def test_of_attention_by_patterns(self, tmp_path: Path):
        """A full fine-tune of some layers: the others are not asked for."""
        model = make_base("sd3", tmp_path).double()
        capture = check_gradients(model, outputs_of(model), ("*.attn.*",))
        assert len(capture.parameters) > 10 and all(".attn." in name for name in capture.parameters)

    def test_of_multihead_attention(self):
        """peft merges the adapters of torch's own attention before each call, so that no layer of theirs is called."""
        torch.manual_seed(0)
        model = nn.ModuleDict({"attention": nn.MultiheadAttention(6, 2, batch_first=True)}).double().eval()
        inject_adapter_in_model(LoraConfig(r=2, target_modules=["attention"]), model, "default")
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                nn.init.normal_(parameter, std=0.3)
        tokens = torch.randn(NUM_EVENTS, 5, 6, dtype=torch.float64)

        def outputs(some: slice) -> Tensor:
            here = tokens[some]
            return loss(model["attention"](here, here, here)[0])

        with pytest.warns(UserWarning, match="exact and slow"):
            capture = check_gradients(model, outputs)
        assert len(capture.uncovered) == len(capture.parameters) == 4


class TestRefusals:
    @pytest.fixture
    def saved(self, tmp_path: Path) -> Path:
        save("peft, metadata", "sd", tmp_path)
        return tmp_path

    def test_without_peft(self, saved: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setitem(sys.modules, "peft", None)
        with pytest.raises(ConfigError, match=r"needs peft .*pip install 'whence\[pipelines\]'"):
            open_lora(saved)

    def test_no_base(self, saved: Path):
        with pytest.raises(CheckpointError, match=r"lora holds a LoRA, which says nothing without.*with --base"):
            list_checkpoints(saved / "lora")

    def test_a_base_that_is_none(self, saved: Path):
        with pytest.raises(
            CheckpointError, match=r"a saved pipeline with a folder unet.*holds pytorch_lora_weights.*--base"
        ):
            list_checkpoints(saved / "lora", base=saved / "lora")

    def test_a_base_of_another_kind(self, saved: Path):
        make_base("sd3", saved / "other")
        with pytest.raises(CheckpointError, match="with a folder unet, or .* holds scheduler, transformer"):
            list_checkpoints(saved / "lora", base=saved / "other")

    def test_a_base_of_other_widths(self, saved: Path):
        other = diffusers.UNet2DConditionModel(**(UNET | {"block_out_channels": (8, 8)}))
        other.save_pretrained(saved / "other")
        (checkpoint,) = list_checkpoints(saved / "lora", base=saved / "other")
        with pytest.raises(
            CheckpointError,
            match=r"does not fit its base: .*to_q has a weight of shape \(8, 8\), its LoRA has \(2, 4\).* more\. ",
        ):
            load_model(checkpoint)

    @pytest.mark.parametrize(
        ("key", "message"),
        [
            ("unet.nowhere.to_q.lora_A.weight", "nowhere.to_q.lora_A.weight fits no layer of the UNet2DConditionModel"),
            ("unet.conv_in.lokr_w1", "conv_in.lokr_w1 is no part of a LoRA that is known"),
            ("unet.conv_in.lora_A.weight", "conv_in.lora_B.weight is missing"),
            ("unet.conv_in.alpha", "has an alpha for conv_in, and no LoRA"),
            ("text_encoder.q_proj.lora_A.weight", "also adapts text_encoder.*without --train_text_encoder"),
            ("lora_te1_q.lora_down.weight", "also adapts lora_te1"),
            ("transformer.to_q.lora_A.weight", "adapts both unet and transformer"),
            ("lora_unet_down_blocks_0.lora_down.weight", "kohya.*save_lora_adapter"),
        ],
    )
    def test_keys_that_do_not_belong(self, key: str, message: str, saved: Path):
        edit(
            saved / "lora",
            lambda state: state.update({key: torch.ones(2, 4) if "alpha" not in key else torch.ones(())}),
        )
        with pytest.raises(CheckpointError, match=message):
            open_lora(saved, lora_alpha=3.0)

    def test_an_alpha_for_some_layers(self, saved: Path):
        key = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.alpha"
        edit(saved / "lora", lambda state: state.update({key: torch.ones(())}))
        with pytest.raises(CheckpointError, match="an alpha for some layers, and none for down_blocks.*attn1.to_k"):
            open_lora(saved)

    def test_weights_that_are_not_finite(self, saved: Path):
        edit(saved / "lora", lambda state: next(iter(state.values())).fill_(float("nan")))
        with pytest.raises(NumericsError, match="holds NaN or infinite"):
            open_lora(saved)

    def test_a_file_that_is_cut_off(self, saved: Path):
        path = saved / "lora" / FILE
        path.write_bytes(path.read_bytes()[:50])
        with pytest.raises(CheckpointError, match="cannot be read: its header is cut off"):
            open_lora(saved)

    def test_averaged_weights(self, saved: Path):
        (checkpoint,) = list_checkpoints(saved / "lora", base=saved / "base")
        with pytest.raises(CheckpointError, match="holds a LoRA, of which there is no moving average"):
            load_model(checkpoint, "ema")

    def test_an_alpha_of_whole_weights(self, saved: Path):
        with pytest.raises(CheckpointError, match="whole weights and no LoRA. Leave --lora-alpha out"):
            list_checkpoints(saved / "base", lora_alpha=2.0)

    def test_a_lora_beside_a_whole_model(self, saved: Path):
        shutil.copy(saved / "lora" / FILE, saved / "base")
        with pytest.raises(
            CheckpointError, match=r"holds a LoRA, pytorch_lora_weights.safetensors, beside a whole model"
        ):
            list_checkpoints(saved / "base")

    def test_pickles(self, saved: Path):
        (saved / "lora" / FILE).rename(saved / "lora" / "pytorch_lora_weights.bin")
        with pytest.raises(CheckpointError, match=r"\.bin is a pickle.*safe_serialization=True"):
            list_checkpoints(saved / "lora", base=saved / "base")

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"peft_type": "LOHA"}, "is a LOHA adapter; whence knows LORA alone"),
            ({"modules_to_save": ["conv_in"]}, r"modules_to_save \['conv_in'\]"),
            ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa'"),
            ({"bias": "all"}, "bias 'all'"),
            ({"r": 4}, "rank 4 of .*, which has 2"),
            ({"invented": 3}, "invented 3"),
        ],
    )
    def test_settings_that_are_not_followed(self, changed: dict[str, Any], message: str, tmp_path: Path):
        save("peft", "sd", tmp_path)
        path = tmp_path / "lora" / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changed))
        with pytest.raises(CheckpointError, match=message):
            open_lora(tmp_path)

    def test_peft_without_its_configuration(self, tmp_path: Path):
        save("peft", "sd", tmp_path)
        (tmp_path / "lora" / "adapter_config.json").unlink()
        with pytest.raises(CheckpointError, match=r"adapter_config.json is missing"):
            open_lora(tmp_path)

    def test_a_magnitude_that_is_missing(self, tmp_path: Path):
        save("peft, metadata", "sd", tmp_path, use_dora=True)
        edit(tmp_path / "lora", lambda state: state.pop(next(key for key in state if "magnitude" in key)))
        with pytest.raises(CheckpointError, match="is not whole: missing are .*magnitude"):
            open_lora(tmp_path, lora_alpha=3.0)
