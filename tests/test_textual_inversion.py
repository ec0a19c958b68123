"""Textual inversion: embeddings that diffusers' script wrote, their gradients by event, and traces of them."""

import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from test_encoding import make_images
from tiny_pipelines import WIDTH, save_pipeline
from whence.checkpoints import describe_network, list_checkpoints, load_model
from whence.config import GradientSettings
from whence.data import ImageData
from whence.diffusion.adapters import needed_conditions, predict
from whence.errors import CheckpointError, DataError, NumericsError
from whence.event_table import grid_events, make_batch
from whence.methods import Grid
from whence.opening import open_run

TOKEN = "<cat>"
CAPTIONS = (f"a {TOKEN}", "a dog", f"red {TOKEN}", f"{TOKEN} on {TOKEN}")
QUICK: dict[str, Any] = {"timesteps": 2, "draws": 2, "show_progress": False}


def save_embeddings(path: Path, vectors: int = 2, *, seed: int = 0, width: int = WIDTH, token: str = TOKEN) -> Path:
    """Write what save_progress of diffusers' textual_inversion.py writes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = torch.randn(vectors, width, generator=torch.Generator().manual_seed(seed))
    save_file({token: values}, path, metadata={"format": "pt"})
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """Read only."""
    return save_pipeline("sd", tmp_path_factory.mktemp("pipeline") / "base")


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return save_embeddings(tmp_path / "output" / "learned_embeds.safetensors").parent


def open_inverted(folder: Path, base: Path, out: Path, captions: Any = CAPTIONS, **conditioning: Any) -> Any:
    run = open_run(folder, data="demo", out=out, conditioning={"base": str(base)} | conditioning)
    run.__dict__["opened_images"] = make_images(captions=captions)
    return run


def reference_pipeline(base: Path, embeddings: Path) -> Any:
    """The pipeline with the token in it, as diffusers puts it there."""
    pipeline = diffusers.DiffusionPipeline.from_pretrained(base)
    pipeline.load_textual_inversion(embeddings)
    return pipeline


def tokenize(pipeline: Any, caption: str) -> Tensor:
    """Give tokens as the pipeline does, several vectors to a placeholder."""
    caption = pipeline.maybe_convert_prompt(caption, pipeline.tokenizer)
    return pipeline.tokenizer(
        caption, max_length=16, padding="max_length", truncation=True, return_tensors="pt"
    ).input_ids


class TestTheNetwork:
    @pytest.mark.parametrize("vectors", [1, 2])
    def test_predicts_as_diffusers_does(self, base: Path, tmp_path: Path, vectors: int):
        file = save_embeddings(tmp_path / "output" / "learned_embeds.safetensors", vectors)
        run = open_inverted(file.parent, base, tmp_path / "out")
        images = run.train_images
        model = load_model(run.checkpoints[0])
        pipeline = reference_pipeline(base, file)
        generator = torch.Generator().manual_seed(1)
        noisy, times = torch.randn(4, 4, 8, 8, generator=generator), torch.tensor([3, 17, 17, 40])
        told = {name: torch.from_numpy(values) for name, values in images.conditions(range(4)).items()}
        found = predict(model, noisy, times, told)
        for k, caption in enumerate(CAPTIONS):
            states = pipeline.text_encoder(tokenize(pipeline, caption))[0]
            want = pipeline.unet(noisy[k : k + 1], times[k], states).sample
            torch.testing.assert_close(found[k : k + 1], want, rtol=1e-4, atol=1e-5)

    def test_only_the_vectors_are_trained(self, base: Path, output: Path):
        model = load_model(list_checkpoints(output, base=base)[0])
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        (vectors,) = trained.values()
        torch.testing.assert_close(vectors.detach(), load_file(output / "learned_embeds.safetensors")[TOKEN])
        assert not model.training

    def test_described_without_weights(self, base: Path, output: Path):
        network = describe_network(list_checkpoints(output, base=base)[0])
        assert needed_conditions(network) == ("input_ids",)
        assert next(network.unet.parameters()).is_meta

    def test_models_of_a_series_share_their_base(self, base: Path, output: Path):
        checkpoint, bases = list_checkpoints(output, base=base)[0], {}
        first, second = load_model(checkpoint, bases=bases), load_model(checkpoint, bases=bases)
        assert first.unet.conv_in.weight is second.unet.conv_in.weight
        tables = [m.text_encoder.get_input_embeddings() for m in (first, second)]
        assert tables[0].frozen.weight is tables[1].frozen.weight
        assert tables[0].learned.weight is not tables[1].learned.weight


def gradient(model: Any, run: Any, images: ImageData, row: int, side: Any, grid: Grid) -> Tensor:
    """Gradient of one image's mean loss, by autograd."""
    table = grid_events(images, [row], side, grid, run.subject.process.num_timesteps, seed=0)
    batch = make_batch(table, images, run.subject.process, dtype=torch.float64)
    error = (predict(model, batch.noisy, batch.times, batch.conditions) - batch.target).square().mean()
    (vectors,) = [p for p in model.parameters() if p.requires_grad]
    return torch.autograd.grad(error, vectors)[0].flatten()


class TestGradients:
    def test_each_event_has_that_of_autograd(self, base: Path, output: Path, tmp_path: Path):
        run = open_inverted(output, base, tmp_path / "out")
        source = run.subject.source(run.checkpoints[0], GradientSettings(dtype="float64", batch_size=4))
        images, process = run.train_images, run.subject.process
        table = grid_events(images, [0, 1, 2, 3], "train", Grid(1, 1), process.num_timesteps, seed=0)
        want = torch.stack([gradient(source.model, run, images, row, "train", Grid(1, 1)) for row in range(4)])
        dots, norms = source.dots(table, images, torch.eye(want.shape[1], dtype=torch.float64), lambda done: None)
        np.testing.assert_allclose(dots, want.numpy(), rtol=1e-9, atol=1e-9 * float(want.abs().max()))
        np.testing.assert_allclose(norms, want.norm(dim=1).numpy(), rtol=1e-9)
        assert norms[1] == 0 and (norms[[0, 2, 3]] > 0).all()  # the second caption lacks the token
        assert not source.capture.uncovered

    def test_a_trace(self, base: Path, output: Path, tmp_path: Path):
        run = open_inverted(output, base, tmp_path / "out")
        queries = make_images(captions=CAPTIONS).select([2])
        scores = run.trace(queries, ["grad-dot"], train_timesteps=2, dtype="float64", **QUICK)["grad-dot"]
        model = load_model(run.checkpoints[-1], dtype="float64")
        asked = gradient(model, run, run.open_queries(queries), 0, "query", Grid(2, 2))
        want = [float(asked @ gradient(model, run, run.train_images, row, "train", Grid(2, 1))) for row in range(4)]
        np.testing.assert_allclose(scores.values[0], want, rtol=1e-9, atol=1e-12 * float(np.abs(want).max()))
        assert scores.values[0, 1] == 0

    def test_one_caption_for_all(self, base: Path, output: Path, tmp_path: Path):
        run = open_inverted(output, base, tmp_path / "out", captions=None, caption=f"a photo of {TOKEN}")
        scores = run.trace(make_images(captions=None).select([1]), ["grad-cos"], train_timesteps=2, **QUICK)
        assert np.isfinite(scores["grad-cos"].values).all()

    def test_images_without_the_token_score_zero(self, base: Path, output: Path, tmp_path: Path):
        run = open_inverted(output, base, tmp_path / "out")
        queries = make_images(captions=CAPTIONS).select([0, 1])  # the second without
        scores = run.trace(queries, ["grad-cos"], train_timesteps=2, **QUICK)["grad-cos"].values
        assert (scores[1] == 0).all() and scores[0, 1] == 0 and (scores[0, [0, 2, 3]] != 0).all()

    def test_a_series_and_a_store(self, base: Path, tmp_path: Path):
        for step in (5, 10):
            save_embeddings(tmp_path / "output" / f"learned_embeds-steps-{step}.safetensors", seed=step)
        save_embeddings(tmp_path / "output" / "learned_embeds.safetensors", seed=10)
        run = open_inverted(tmp_path / "output", base, tmp_path / "out")
        assert [c.step for c in run.checkpoints] == [5, 10]
        assert len({c.content_hash() for c in run.checkpoints}) == 2
        queries = make_images(captions=CAPTIONS).select([0, 2])
        traced = run.trace(queries, ["tracin"], train_timesteps=2, **QUICK)["tracin"]
        run.index(train_timesteps=2, projection="identity", rows="float32", show_progress=False)
        stored = run.query(queries, ["tracin"], **QUICK)["tracin"]
        np.testing.assert_allclose(stored.values, traced.values, rtol=0, atol=1e-4 * float(np.abs(traced.values).max()))
        # The folder knows its base when it is opened again.
        again = open_run(tmp_path / "out")
        assert [c.base_folder for c in again.checkpoints] == [base / "unet"] * 2

    def test_influence(self, base: Path, output: Path, tmp_path: Path):
        run = open_inverted(output, base, tmp_path / "out")
        queries = make_images(captions=CAPTIONS).select([0])
        scores = run.trace(queries, ["ekfac"], train_timesteps=2, **QUICK)["ekfac"]
        assert np.isfinite(scores.values).all()

    def test_samples(self, base: Path, output: Path, tmp_path: Path):
        run = open_inverted(output, base, tmp_path / "out")
        path = run.sample(1, prompts=[f"a {TOKEN}"], guidance_scale=2.0, steps=2, show_progress=False)
        scores = run.trace(str(path), ["grad-dot"], train_timesteps=2, **QUICK)["grad-dot"]
        assert (scores.values[0, [0, 2, 3]] != 0).all()


class TestCheckpoints:
    def test_a_checkpoint_folder(self, base: Path, tmp_path: Path):
        save_embeddings(tmp_path / "output" / "checkpoint-7" / "learned_embeds.safetensors")
        for given in (tmp_path / "output", tmp_path / "output" / "checkpoint-7"):
            (found,) = list_checkpoints(given, base=base / "unet")
            assert found.step == 7 and found.model_folder == base / "unet"

    def test_folders_of_accelerate_beside_it_are_passed_over(self, base: Path, output: Path):
        (output / "checkpoint-500").mkdir()
        save_file({"weight": torch.ones(2)}, output / "checkpoint-500" / "model.safetensors")
        (found,) = list_checkpoints(output, base=base)
        assert found.folder == output

    def test_a_pipeline_around_it_is_its_base(self, base: Path, tmp_path: Path):
        """What --save_as_full_pipeline leaves: tokenizer and text encoder know the token already."""
        file = save_embeddings(tmp_path / "learned_embeds.safetensors")
        reference_pipeline(base, file).save_pretrained(tmp_path / "output")
        shutil.move(file, tmp_path / "output" / file.name)
        run = open_run(tmp_path / "output", data="demo", out=tmp_path / "out")
        run.__dict__["opened_images"] = make_images(captions=CAPTIONS)
        assert run.checkpoints[0].base_folder == tmp_path / "output" / "unet"
        other = open_inverted(save_embeddings(tmp_path / "alone" / file.name).parent, base, tmp_path / "out2")
        noisy, times = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.full((4,), 20)
        made = []
        for one in (run, other):
            told = {name: torch.from_numpy(v) for name, v in one.train_images.conditions(range(4)).items()}
            made.append(predict(load_model(one.checkpoints[0]), noisy, times, told))
        torch.testing.assert_close(made[0], made[1], rtol=1e-4, atol=1e-5)

    def test_the_hash_is_of_embeddings_text_encoder_and_unet(self, base: Path, output: Path, tmp_path: Path):
        other = shutil.copytree(base, tmp_path / "other")
        hashes = [list_checkpoints(output, base=base)[0].content_hash()]
        save_embeddings(output / "learned_embeds.safetensors", seed=1)
        hashes.append(list_checkpoints(output, base=other)[0].content_hash())
        for part in ("text_encoder", "unet"):
            (path,) = (other / part).glob("*.safetensors")
            state = load_file(path)
            save_file({name: value + 1 for name, value in state.items()}, path, metadata={"format": "pt"})
            hashes.append(list_checkpoints(output, base=other)[0].content_hash())
        assert len(set(hashes)) == 4


class TestCaptions:
    def test_vectors_that_were_written_out(self, base: Path, output: Path, tmp_path: Path):
        encoder = self.encoder(output, base, tmp_path)
        short, long = encoder.conditions([f"a {TOKEN} x", f"a {TOKEN} {TOKEN}_1 x"], (16, 16))["input_ids"]
        np.testing.assert_array_equal(short, long)
        first = 2 * 39 + 2
        assert [n - first for n in short if n >= first] == [0, 1]

    def test_the_hash_is_of_tokens_not_of_vectors(self, base: Path, output: Path, tmp_path: Path):
        hashes = [self.encoder(output, base, tmp_path).hash]
        for vectors, token in ((2, TOKEN), (1, TOKEN), (2, "<dog>")):
            save_embeddings(output / "learned_embeds.safetensors", vectors, seed=1, token=token)
            hashes.append(self.encoder(output, base, tmp_path).hash)
        assert hashes[0] == hashes[1] and len(set(hashes)) == 3

    @staticmethod
    def encoder(output: Path, base: Path, tmp_path: Path) -> Any:
        return open_inverted(output, base, tmp_path / "out").encoding.encoder

    @pytest.mark.parametrize("captions", [None, ("a cat",) * 4])
    def test_without_the_token(self, base: Path, output: Path, tmp_path: Path, captions: Any):
        run = open_inverted(output, base, tmp_path / "out", captions=captions)
        with pytest.raises(DataError, match=r'must contain <cat>.*none of 4 does.*--caption "a photo of <cat>"'):
            _ = run.train_images

    def test_queries_without_the_token(self, base: Path, output: Path, tmp_path: Path):
        run = open_inverted(output, base, tmp_path / "out")
        with pytest.raises(DataError, match="none of 1 does.*to queries with --prompts"):
            run.open_queries(make_images(captions=CAPTIONS).select([1]))

    def test_the_token_is_cut_off(self, base: Path, output: Path, tmp_path: Path):
        run = open_inverted(output, base, tmp_path / "out", captions=(f"a very long caption about {TOKEN}",) * 4)
        with pytest.raises(DataError, match="within the 16 tokens that the text encoder reads"):
            _ = run.train_images


class TestRefusals:
    def test_no_base(self, output: Path):
        with pytest.raises(CheckpointError, match="embeddings of textual inversion.*pipeline with --base"):
            list_checkpoints(output)

    def test_a_base_without_text_encoder(self, base: Path, output: Path, tmp_path: Path):
        shutil.copytree(base / "unet", tmp_path / "other" / "unet")
        with pytest.raises(CheckpointError, match="has no folder text_encoder with a config.json.*--base"):
            list_checkpoints(output, base=tmp_path / "other")

    def test_another_width(self, base: Path, tmp_path: Path):
        file = save_embeddings(tmp_path / "output" / "learned_embeds.safetensors", width=6)
        run = open_inverted(file.parent, base, tmp_path / "out")
        with pytest.raises(CheckpointError, match="embeddings of width 8; in .*<cat> has 6.*--base"):
            _ = run.train_images

    def test_sdxl(self, output: Path, tmp_path: Path):
        save_pipeline("sdxl", tmp_path / "base")
        with pytest.raises(CheckpointError, match="two text encoders, as SDXL does"):
            list_checkpoints(output, base=tmp_path / "base")
        save_embeddings(output / "learned_embeds_2.safetensors")
        with pytest.raises(CheckpointError, match="second text encoder of SDXL.*LoRA for example"):
            list_checkpoints(output)

    def test_pickles(self, tmp_path: Path):
        torch.save({TOKEN: torch.ones(6)}, tmp_path / "learned_embeds.bin")
        with pytest.raises(CheckpointError, match="is a pickle.*no_safe_serialization"):
            list_checkpoints(tmp_path)

    def test_a_last_one_of_no_known_step(self, base: Path, output: Path):
        save_embeddings(output / "learned_embeds-steps-5.safetensors", seed=5)
        with pytest.raises(CheckpointError, match="is not the last of the series.*--max_train_steps"):
            list_checkpoints(output, base=base)

    def test_a_series_of_two_shapes(self, base: Path, tmp_path: Path):
        for step in (1, 2):
            save_embeddings(tmp_path / "output" / f"learned_embeds-steps-{step}.safetensors", vectors=step)
        run = open_inverted(tmp_path / "output", base, tmp_path / "out")
        with pytest.raises(CheckpointError, match=r"one architecture.*vectors of <cat> is \(2, 8\), not \(1, 8\)"):
            run.trace(make_images(captions=CAPTIONS).select([0]), ["tracin"], train_timesteps=2, **QUICK)

    def test_files_of_something_else(self, base: Path, output: Path):
        for held in ({TOKEN: torch.ones(2, 2, 8)}, {TOKEN: torch.ones(8), "<dog>": torch.ones(6)}):
            save_file(held, output / "learned_embeds.safetensors")
            with pytest.raises(CheckpointError, match="must hold vectors of one width, by placeholder token"):
                load_model(list_checkpoints(output, base=base)[0])

    def test_numbers_that_are_not_finite(self, base: Path, output: Path):
        save_file({TOKEN: torch.full((2, 8), torch.nan)}, output / "learned_embeds.safetensors")
        with pytest.raises(NumericsError, match="<cat> holds NaN"):
            load_model(list_checkpoints(output, base=base)[0])

    def test_a_text_encoder_that_is_not_whole(self, base: Path, output: Path, tmp_path: Path):
        other = shutil.copytree(base, tmp_path / "other")
        (path,) = (other / "text_encoder").glob("*.safetensors")
        state = load_file(path)
        state.pop(next(name for name in state if name.endswith("final_layer_norm.weight")))
        save_file(state, path, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match="is not whole: missing are .*final_layer_norm"):
            load_model(list_checkpoints(output, base=other)[0])

    def test_a_text_encoder_in_a_pickle(self, base: Path, output: Path, tmp_path: Path):
        other = shutil.copytree(base, tmp_path / "other")
        (path,) = (other / "text_encoder").glob("*.safetensors")
        torch.save(load_file(path), path.with_name("pytorch_model.bin"))
        path.unlink()
        checkpoint = list_checkpoints(output, base=other)[0]
        with pytest.raises(CheckpointError, match="is a pickle.*--allow-pickle"):
            load_model(checkpoint)
        model = load_model(checkpoint, allow_pickle=True)
        want = load_model(list_checkpoints(output, base=base)[0])
        for name, value in want.state_dict().items():
            assert torch.equal(model.state_dict()[name], value), name

    def test_a_text_encoder_of_another_class(self, base: Path, output: Path, tmp_path: Path):
        other = shutil.copytree(base, tmp_path / "other")
        path = other / "text_encoder" / "config.json"
        path.write_text(path.read_text().replace('"CLIPTextModel"', '"BertModel"'))
        with pytest.raises(CheckpointError, match=r"names class \['BertModel'\].*CLIPTextModel"):
            load_model(list_checkpoints(output, base=other)[0])

    def test_beside_a_lora_or_weights(self, base: Path, output: Path):
        save_file({"unet.x": torch.ones(1)}, output / "pytorch_lora_weights.safetensors")
        with pytest.raises(CheckpointError, match="holds a LoRA.*beside embeddings of textual inversion"):
            list_checkpoints(output, base=base)
        (output / "pytorch_lora_weights.safetensors").unlink()
        with pytest.raises(CheckpointError, match="embeddings of textual inversion and no LoRA"):
            list_checkpoints(output, base=base, lora_alpha=2.0)
        with pytest.raises(CheckpointError, match="embeddings of textual inversion, of which there is no moving"):
            list_checkpoints(output, base=base)[0].weights_folder("ema")
        save_embeddings(output / "checkpoint-1" / "learned_embeds.safetensors")
        shutil.copytree(base / "unet", output / "checkpoint-2" / "unet")
        with pytest.raises(CheckpointError, match="checkpoint-1 holds embeddings of textual inversion.*checkpoint-2"):
            list_checkpoints(output, base=base)
