"""A series of LoRA checkpoints, opened as a trace opens it."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch

from conftest import toy_images
from lora_models import (
    NETWORKS,
    UNET,
    add_adapters,
    conditions,
    draw_weights,
    make_base,
    save_diffusers,
    save_peft,
)
from own_trainers import save_lora
from whence import _networks
from whence.checkpoints import check_same_architecture, list_checkpoints, load_model, load_scheduler
from whence.config import GradientSettings, RetrainingSettings
from whence.data import ImageData
from whence.diffusion.adapters import predict
from whence.encoded import Conditions, Encoded, Latents
from whence.errors import CheckpointError
from whence.event_table import grid_events, make_batch
from whence.methods import Grid
from whence.record import _MANIFEST_KEYS, FORMAT_VERSION
from whence.retraining import retrain
from whence.subject import Subject

RTOL = 1e-9
"""float64, some ten layers deep."""


def make_series(network: str, folder: Path, steps: Sequence[int] = (5, 10)) -> Path:
    """A DreamBooth run: one base, and the LoRA after some steps."""
    make_base(network, folder / "base")
    for step in steps:
        adapted = make_base(network, folder / "base")
        config = add_adapters(adapted, seed=step)
        save_diffusers(adapted, config, folder / "run" / f"checkpoint-{step}", network)
        (folder / "run" / f"checkpoint-{step}" / "optimizer.bin").write_bytes(b"accelerate")
    return folder / "run"


def latent_images(network: str, count: int = 4) -> ImageData:
    """Images with latents and the conditions of one caption."""
    rng = np.random.default_rng(0)
    told = {name: tensor.numpy() for name, tensor in conditions(1, torch.float32).items()}
    needed = {"sd": 1, "sdxl": 3, "sd3": 2, "flux": 2}
    order = {"sdxl": ("encoder_hidden_states", "text_embeds", "time_ids")}
    names = order.get(network, ("encoder_hidden_states", "pooled_projections"))[: needed[network]]
    of_caption = Conditions(("sks dog",), {n: told[n] for n in names}, np.zeros(count, np.int64))
    latents = Latents(rng.standard_normal((count, 4, 8, 8)).astype(np.float32))
    return replace(toy_images(count), encoding=Encoded("test", latents, None, of_caption))


class TestSeries:
    @pytest.mark.parametrize("network", list(NETWORKS))
    def test_a_subject_gives_gradients_of_the_adapters(self, network: str, tmp_path: Path):
        run = make_series(network, tmp_path)
        checkpoints = list_checkpoints(run, base=tmp_path / "base")
        assert [c.step for c in checkpoints] == [5, 10]
        check_same_architecture(checkpoints)
        images = latent_images(network)
        subject = Subject(checkpoints, images, None, "mse")
        sources = [subject.source(c, GradientSettings(dtype="float64", batch_size=4)) for c in checkpoints]
        for source in sources:
            adapters = [p for name, p in source.model.named_parameters() if ".lora_" in name]
            assert source.layout.num_params == sum(p.numel() for p in adapters)
            assert all(
                name.endswith((".lora_A.default.weight", ".lora_B.default.weight")) for name in source.layout.spans
            )
            source.check(images)
            table = grid_events(images, range(4), "train", Grid(timesteps=1, draws=1), source.process.num_timesteps, 0)
            dots, norms = source.dots(
                table, images, torch.eye(source.layout.num_params, dtype=torch.float64), lambda _: None
            )
            batch = make_batch(table, images, source.process, dtype=torch.float64)
            for event in range(4):
                here = batch.take(slice(event, event + 1))
                prediction = predict(source.model, here.noisy, here.times, here.conditions)
                error = (prediction - here.target).square().mean() * here.loss_weight[0]
                want = torch.cat([g.flatten() for g in torch.autograd.grad(error, adapters)])
                torch.testing.assert_close(
                    torch.from_numpy(dots[event]), want, rtol=RTOL, atol=RTOL * float(want.norm())
                )
                assert norms[event] == pytest.approx(float(want.norm()), rel=RTOL)

    def test_the_base_is_loaded_once_and_shared(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        subject = Subject(
            list_checkpoints(make_series("sd", tmp_path), base=tmp_path / "base"), latent_images("sd"), None, "mse"
        )
        reads = []
        read = _networks.read_weights
        monkeypatch.setattr(_networks, "read_weights", lambda *args: reads.append(args) or read(*args))
        first, second = (subject.source(c, GradientSettings()).model for c in subject.checkpoints)
        assert len(reads) == 1
        shared, own = dict(first.named_parameters()), dict(second.named_parameters())
        assert shared.keys() == own.keys()
        for name, parameter in own.items():
            is_adapter = ".lora_" in name
            assert parameter.requires_grad == is_adapter
            assert (parameter.data_ptr() == shared[name].data_ptr()) != is_adapter
        alone = load_model(subject.checkpoints[1])
        assert all(torch.equal(p, own[name]) for name, p in alone.named_parameters())

    def test_the_base_that_the_record_names(self, tmp_path: Path):
        run = make_series("sd", tmp_path)
        write_manifest(run, str(tmp_path / "base"))
        for given in (run, run / "checkpoint-5"):
            assert list_checkpoints(given)[0].base_folder == tmp_path / "base" / "unet"
        assert list_checkpoints(run, base=tmp_path / "base" / "unet")[0].base_folder == tmp_path / "base" / "unet"

    def test_a_base_that_the_record_names_and_is_elsewhere(self, tmp_path: Path):
        run = make_series("sd", tmp_path)
        write_manifest(run, "stabilityai/sd")
        with pytest.raises(CheckpointError, match=r"trained on stabilityai/sd, which is no folder here.*--base"):
            list_checkpoints(run)

    def test_the_base_that_peft_names(self, tmp_path: Path):
        base = make_base("sd", tmp_path / "base")
        adapted = make_base("sd", tmp_path / "base")
        save_peft(base, add_adapters(adapted, seed=1), adapted, tmp_path / "lora")
        path = tmp_path / "lora" / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(tmp_path / "base")}))
        assert list_checkpoints(tmp_path / "lora")[0].base_folder == tmp_path / "base" / "unet"

    def test_the_scheduler_of_the_base(self, tmp_path: Path):
        checkpoints = list_checkpoints(make_series("flux", tmp_path), base=tmp_path / "base")
        assert type(load_scheduler(checkpoints[0])).__name__ == "FlowMatchEulerDiscreteScheduler"
        diffusers.FlowMatchHeunDiscreteScheduler().save_pretrained(tmp_path / "run" / "scheduler")
        assert type(load_scheduler(checkpoints[0])).__name__ == "FlowMatchHeunDiscreteScheduler"

    def test_the_hash_depends_on_adapters_and_base(self, tmp_path: Path):
        run = make_series("sd", tmp_path)

        def hashes() -> list[str]:
            return [c.content_hash() for c in list_checkpoints(run, base=tmp_path / "base")]

        before = hashes()
        assert len(set(before)) == 2 and hashes() == before
        draw = diffusers.UNet2DConditionModel(**UNET)
        draw_weights(draw, seed=9)
        draw.save_pretrained(tmp_path / "base" / "unet")
        assert not set(before) & set(hashes())

    def test_loras_that_are_trained_again(self, tmp_path: Path):
        """A trainer of one's own leaves a LoRA; its base is that of the run."""
        images = latent_images("sd")
        subject = Subject(list_checkpoints(make_series("sd", tmp_path), base=tmp_path / "base"), images, None, "mse")
        settings = RetrainingSettings(
            trainer="own_trainers:save_lora", subsets=2, seeds=(1,), timesteps=2, draws=2, threads=1
        )
        queries = replace(images.select([0]), ids=("query",))
        found = retrain(subject, {"query": queries}, settings, tmp_path / "truth", show_progress=False)
        for subset, members in enumerate(found.subsets):
            ids = [id_ for id_, member in zip(found.train_ids, members, strict=True) if member]
            save_lora(ids, 1, tmp_path / f"{subset}")
            (again,) = list_checkpoints(tmp_path / f"{subset}", base=tmp_path / "base")
            assert found.models[subset][0] == again.content_hash()

    def test_a_series_of_several_ranks_is_refused(self, tmp_path: Path):
        run = make_series("sd", tmp_path)
        adapted = make_base("sd", tmp_path / "base")
        save_diffusers(adapted, add_adapters(adapted, seed=1, r=3), run / "checkpoint-15", "sd")
        with pytest.raises(CheckpointError, match="checkpoint-15 differs from .*checkpoint-5: .*to_k.lora_A.weight is"):
            check_same_architecture(list_checkpoints(run, base=tmp_path / "base"))

    def test_loras_and_whole_weights_are_not_mixed(self, tmp_path: Path):
        run = make_series("sd", tmp_path)
        make_base("sd", run / "checkpoint-15")
        with pytest.raises(CheckpointError, match=r"checkpoint-5 holds a LoRA, .*checkpoint-15 whole weights"):
            list_checkpoints(run, base=tmp_path / "base")


def write_manifest(run: Path, base: str) -> None:
    about = dict.fromkeys(_MANIFEST_KEYS, 0) | {"format_version": FORMAT_VERSION}
    (run / "record").mkdir()
    (run / "record" / "manifest.json").write_text(
        json.dumps(about | {"config": {"pretrained_model_name_or_path": base}})
    )
