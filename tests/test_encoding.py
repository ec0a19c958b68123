"""Encoding by a pipeline's own parts: against calls as training scripts make them, its cache, and what is refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch.nn import functional

from tiny_pipelines import PIPELINES, save_pipeline
from whence.arguments import Queries
from whence.checkpoints import list_checkpoints, load_model
from whence.config import ConditioningSettings, CounterfactualSettings, ObjectiveSettings
from whence.data import ImageData
from whence.diffusion.adapters import predict
from whence.encoding import BLOCK, find_encoding
from whence.errors import CheckpointError, ConfigError, DataError, RecordError, UnsupportedModelError
from whence.event_table import check_same_data, make_batch
from whence.methods import GradientPlan, Grid, Trajectory, method_by_name
from whence.opening import open_run
from whence.pipeline_encoder import PipelineEncoder
from whence.record import SCHEMA, Record, Visits
from whence.trajectories import Trajectories

CAPTIONS = ("a cat", "a dog", "a cat", "red car")


def make_images(count: int = 4, captions: tuple[str, ...] | None = CAPTIONS, channels: int = 3) -> ImageData:
    pixels = np.random.default_rng(0).uniform(-1, 1, (count, channels, 16, 16)).astype(np.float32)
    return ImageData.from_arrays(
        pixels, [f"i{k}" for k in range(count)], [str(k % 3) for k in range(count)], captions and captions[:count]
    )


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory) -> Path:
    """One pipeline of each kind; read only."""
    folder = tmp_path_factory.mktemp("pipelines")
    for kind in PIPELINES:
        save_pipeline(kind, folder / kind)
    return folder


def open_tiny(pipelines: Path, kind: str, out: Path, images: ImageData | None = None, **conditioning: Any) -> Any:
    run = open_run(pipelines / kind, data="demo", out=out, conditioning=conditioning or None)
    run.__dict__["opened_images"] = images or make_images()
    return run


# --- the whole way, against what the training scripts of diffusers do


def call_as_scripts_do(
    pipeline: Any, kind: str, noisy: torch.Tensor, times: torch.Tensor, caption: str
) -> torch.Tensor:
    """Call the network on one event with the conditions that the training scripts make of its caption."""
    one = {"device": "cpu", "num_images_per_prompt": 1}
    if kind == "sd":
        ids = pipeline.tokenizer(caption, max_length=16, padding="max_length", truncation=True, return_tensors="pt")
        return pipeline.unet(noisy, times, pipeline.text_encoder(ids.input_ids, return_dict=False)[0])[0]
    if kind == "sdxl":
        embeddings = []
        for tokenizer, encoder in (
            (pipeline.tokenizer, pipeline.text_encoder),
            (pipeline.tokenizer_2, pipeline.text_encoder_2),
        ):
            ids = tokenizer(
                caption, padding="max_length", max_length=16, truncation=True, return_tensors="pt"
            ).input_ids
            found = encoder(ids, output_hidden_states=True, return_dict=False)
            pooled = found[0]
            embeddings.append(found[-1][-2])
        added = {"text_embeds": pooled, "time_ids": torch.tensor([[16.0, 16, 0, 0, 16, 16]])}
        return pipeline.unet(noisy, times, torch.cat(embeddings, dim=-1), added_cond_kwargs=added)[0]
    if kind == "sd3":
        embeddings, _, pooled, _ = pipeline.encode_prompt(caption, None, None, do_classifier_free_guidance=False, **one)
        return pipeline.transformer(
            hidden_states=noisy, timestep=times, encoder_hidden_states=embeddings, pooled_projections=pooled
        )[0]
    if kind == "flux":
        embeddings, pooled, text_ids = pipeline.encode_prompt(caption, None, **one)
        packed = pipeline._pack_latents(noisy, 1, 4, 8, 8)
        ids = pipeline._prepare_latent_image_ids(1, 4, 4, "cpu", torch.float32)
        made = pipeline.transformer(
            hidden_states=packed,
            timestep=times / 1000,
            pooled_projections=pooled,
            encoder_hidden_states=embeddings,
            txt_ids=text_ids,
            img_ids=ids,
        )[0]
        return pipeline._unpack_latents(made, 16, 16, 2)
    if kind == "pixart":
        embeddings, mask, *_ = pipeline.encode_prompt(caption, do_classifier_free_guidance=False, **one)
        added = {"resolution": None, "aspect_ratio": None}
        made = pipeline.transformer(
            noisy,
            encoder_hidden_states=embeddings,
            encoder_attention_mask=mask,
            timestep=times,
            added_cond_kwargs=added,
        )[0]
        return made.chunk(2, dim=1)[0]
    if kind == "sana":
        embeddings, mask, *_ = pipeline.encode_prompt(caption, do_classifier_free_guidance=False, **one)
        return pipeline.transformer(
            noisy, encoder_hidden_states=embeddings, encoder_attention_mask=mask, timestep=times
        )[0]
    assert kind == "dit"
    return pipeline.transformer(noisy, timestep=times, class_labels=torch.tensor([int(caption)]))[0].chunk(2, dim=1)[0]


def latents_as_scripts_make_them(pipeline: Any, pixels: torch.Tensor) -> torch.Tensor:
    autoencoder = pipeline.vae
    encoded = autoencoder.encode(pixels)
    latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latent
    shift = getattr(autoencoder.config, "shift_factor", None) or 0.0
    return (latents - shift) * autoencoder.config.scaling_factor


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3", "flux", "pixart", "sana", "dit"])
def test_latents_conditions_and_losses_are_those_of_training_scripts(pipelines: Path, tmp_path: Path, kind: str):
    run = open_tiny(pipelines, kind, tmp_path / "out")
    images, process = run.train_images, run.subject.process
    plan = GradientPlan(output="loss", events=Grid(timesteps=3, draws=1), unit="timestep")
    table, batch = run.events(plan, ["i3", "i1"])
    ours = predict(load_model(run.checkpoints[-1]), batch.noisy, batch.times, batch.conditions)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(pipelines / kind)
    with torch.no_grad():
        for event in range(len(table)):
            row = table.row[event]
            clean = latents_as_scripts_make_them(pipeline, torch.from_numpy(images.pixels([row])))
            torch.testing.assert_close(batch.clean[event : event + 1], clean, rtol=1e-5, atol=1e-6)
            noise, times = batch.noise[event : event + 1], batch.times[event : event + 1]
            if hasattr(pipeline.scheduler, "add_noise"):
                noisy, target = pipeline.scheduler.add_noise(clean, noise, times), noise
            else:
                place = (pipeline.scheduler.timesteps == times).nonzero().item()
                sigma = pipeline.scheduler.sigmas[place]
                noisy, target = (1 - sigma) * clean + sigma * noise, noise - clean
            text = images.labels[row] if kind == "dit" else CAPTIONS[row]
            theirs = call_as_scripts_do(pipeline, kind, noisy, times, text)
            torch.testing.assert_close(ours[event : event + 1], theirs, rtol=1e-4, atol=1e-5)
            loss = functional.mse_loss(ours[event], batch.target[event])
            assert loss.item() == pytest.approx(functional.mse_loss(theirs, target).item(), rel=1e-4)
    assert process.prediction_type == ("flow" if kind in ("sd3", "flux", "sana") else "epsilon")


@pytest.mark.parametrize("kind", sorted(PIPELINES))
def test_every_kind_is_traced(pipelines: Path, tmp_path: Path, kind: str):
    run = open_tiny(pipelines, kind, tmp_path / "out")
    queries = make_images().select([0, 1])
    scores = run.trace(queries, ["grad-cos", "pixels"], timesteps=2, draws=2, train_timesteps=2, show_progress=False)
    found = scores["grad-cos"].values
    assert found.shape == (2, 4) and np.isfinite(found).all() and (np.abs(found) <= 1 + 1e-6).all()
    assert len(np.unique(found.round(6))) == 8  # each pair has a score of its own


def test_gradients_of_a_text_to_image_model_are_those_of_autograd(pipelines: Path, tmp_path: Path):
    run = open_tiny(pipelines, "sd", tmp_path / "out")
    scores = run.trace(
        make_images().select([1]),
        ["grad-dot"],
        timesteps=2,
        draws=2,
        train_timesteps=2,
        dtype="float64",
        show_progress=False,
    )["grad-dot"]
    model = load_model(run.checkpoints[-1], dtype="float64")

    def gradient(images: ImageData, row: int, side: str, grid: Grid) -> torch.Tensor:
        from whence.event_table import grid_events

        table = grid_events(images, [row], side, grid, 50, seed=0)
        batch = make_batch(table, images, run.subject.process, dtype=torch.float64)
        loss = (predict(model, batch.noisy, batch.times, batch.conditions) - batch.target).square().mean()
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])

    queries = run.open_queries(make_images().select([1]))
    asked = gradient(queries, 0, "query", Grid(2, 2))
    want = [float(asked @ gradient(run.train_images, row, "train", Grid(2, 1))) for row in range(4)]
    np.testing.assert_allclose(scores.values[0], want, rtol=1e-6)


# --- the cache


def test_what_is_encoded_is_not_encoded_again(pipelines: Path, tmp_path: Path, monkeypatch):
    first = open_tiny(pipelines, "sd", tmp_path / "out").train_images
    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", _not_again)
    again = open_tiny(pipelines, "sd", tmp_path / "out").train_images
    np.testing.assert_array_equal(first.inputs([0, 3]), again.inputs([0, 3]))
    for name, values in first.conditions([0, 3]).items():
        np.testing.assert_array_equal(values, again.conditions([0, 3])[name])
    assert first.fingerprint == again.fingerprint
    with pytest.raises(CheckpointError, match="loaded again"):  # other captions are other conditions
        _ = open_tiny(pipelines, "sd", tmp_path / "out", make_images(captions=("a", "b", "c", "d"))).train_images


def test_an_interrupted_encoding_goes_on(pipelines: Path, tmp_path: Path, monkeypatch):
    images = make_images(BLOCK + 3, captions=("a cat",) * (BLOCK + 3))
    whole = open_tiny(pipelines, "sd", tmp_path / "out", images).train_images
    (first, second) = sorted((tmp_path / "out" / "cache" / "encoded").glob("*/latents-*"))
    second.unlink()
    sizes = []
    encode = PipelineEncoder.latents
    monkeypatch.setattr(
        PipelineEncoder, "latents", lambda self, pixels, **k: sizes.append(len(pixels)) or encode(self, pixels, **k)
    )
    again = open_tiny(pipelines, "sd", tmp_path / "out", images).train_images
    assert sizes == [3] and first.exists()
    np.testing.assert_array_equal(whole.inputs(range(len(images))), again.inputs(range(len(images))))


def _not_again(*_: Any, **__: Any) -> None:
    raise AssertionError("the pipeline was loaded again")


def test_equal_captions_are_held_once_and_one_condition_stands_for_withheld_ones(pipelines: Path, tmp_path: Path):
    conditions = open_tiny(pipelines, "sd", tmp_path / "out").train_images.encoding.conditions
    assert conditions.texts == ("", "a cat", "a dog", "red car")
    assert conditions.of_row.tolist() == [1, 2, 1, 3]
    given = conditions.take(np.array([0, 3]), np.array([False, True]))["encoder_hidden_states"]
    np.testing.assert_array_equal(given, conditions.arrays["encoder_hidden_states"][[1, 0]])


def test_flips_and_posterior_are_encoded_where_training_had_them(pipelines: Path, tmp_path: Path):
    images = make_images()
    encoding = find_encoding(list_checkpoints(pipelines / "sd")[0], images, None, ConditioningSettings())
    encoded = replace(encoding, mirrored=True, drawn=True).encode(images, tmp_path).encoding
    vae = diffusers.AutoencoderKL.from_pretrained(pipelines / "sd" / "vae")
    with torch.no_grad():
        posterior = vae.encode(torch.from_numpy(images.pixels([1])).flip(-1)).latent_dist
    mean, deviation = encoded.clean(np.array([1]), np.array([True]))
    np.testing.assert_allclose(mean, posterior.mean * vae.config.scaling_factor, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(deviation, posterior.std * vae.config.scaling_factor, rtol=1e-5)
    assert not np.allclose(encoded.clean(np.array([1]))[0], mean)


# --- what is refused


def without(folder: Path, part: str, out: Path) -> Path:
    """Copy a pipeline without one of its parts."""
    shutil.copytree(folder, out)
    index = json.loads((out / "model_index.json").read_text())
    index[part] = [None, None]
    (out / "model_index.json").write_text(json.dumps(index))
    shutil.rmtree(out / part)
    return out


def test_a_network_alone_asks_for_its_pipeline(pipelines: Path, tmp_path: Path):
    alone = shutil.copytree(pipelines / "sd" / "unet", tmp_path / "alone")
    shutil.copytree(pipelines / "sd" / "scheduler", tmp_path / "alone" / "scheduler")
    run = open_tiny(tmp_path, "alone", tmp_path / "out")
    with pytest.raises(CheckpointError, match="is told encoder_hidden_states. Give the pipeline .* with --base"):
        _ = run.train_images
    named = open_tiny(tmp_path, "alone", tmp_path / "other", base=str(pipelines / "sd"))
    assert named.train_images.input_shape == (4, 8, 8)
    assert open_run(tmp_path / "other").conditioning.base == str(pipelines / "sd")  # kept with the run
    assert alone.exists()


@pytest.mark.parametrize("part", ["text_encoder", "tokenizer"])
def test_a_missing_text_encoder(pipelines: Path, tmp_path: Path, part: str):
    folder = without(pipelines / "sd", part, tmp_path / "less")
    with pytest.raises(CheckpointError, match=f"has no {part}, by which the UNet2DConditionModel is told captions"):
        _ = open_tiny(folder.parent, "less", tmp_path / "out").train_images


def test_a_missing_vae(pipelines: Path, tmp_path: Path):
    without(pipelines / "sd", "vae", tmp_path / "less")
    run = open_tiny(tmp_path, "less", tmp_path / "out")
    with pytest.raises(CheckpointError, match="takes 4 channels; the training images have 3. .* VAE"):
        run.subject.source(run.checkpoints[-1], _settings())


def test_a_vae_of_other_channels(pipelines: Path, tmp_path: Path):
    with pytest.raises(CheckpointError, match="VAE in .* takes 3 channels; the images have 1. Leave --grey out"):
        _ = open_tiny(pipelines, "sd", tmp_path / "out", make_images(channels=1)).train_images


def _settings() -> Any:
    from whence.config import GradientSettings

    return GradientSettings()


def test_a_part_whose_folder_is_missing(pipelines: Path, tmp_path: Path):
    folder = shutil.copytree(pipelines / "sd", tmp_path / "less")
    shutil.rmtree(folder / "vae")
    with pytest.raises(CheckpointError, match="model_index.json in .* names vae, whose folders are missing. Restore"):
        _ = open_tiny(tmp_path, "less", tmp_path / "out").train_images
    (folder / "model_index.json").write_text("{")
    with pytest.raises(CheckpointError, match="model_index.json cannot be read"):
        _ = open_tiny(tmp_path, "less", tmp_path / "out").train_images


def test_images_without_captions(pipelines: Path, tmp_path: Path):
    with pytest.raises(DataError, match="4 of 4 images of memory have none: i0.*--caption-column.*--caption"):
        _ = open_tiny(pipelines, "sd", tmp_path / "out", make_images(captions=None)).train_images
    run = open_tiny(pipelines, "sd", tmp_path / "other", make_images(captions=None), caption="a photo of sks dog")
    assert set(run.train_images.encoding.conditions.texts) == {"", "a photo of sks dog"}


def test_labels_are_numbered_and_unknown_ones_refused(pipelines: Path, tmp_path: Path):
    run = open_tiny(pipelines, "dit", tmp_path / "out")
    assert run.train_images.conditions([0, 1, 2, 3])["class_labels"].tolist() == [0, 1, 2, 0]
    named = ImageData.from_arrays(make_images().pixels([0, 1]), ["x", "y"], ["cat", "ant"])
    assert open_tiny(pipelines, "dit", tmp_path / "b", named).train_images.conditions([0, 1])[
        "class_labels"
    ].tolist() == [1, 0]
    with pytest.raises(DataError, match="knows the labels 0, 1, 2; found 'ant', 'cat'"):
        run.open_queries(named)
    many = ImageData.from_arrays(make_images().pixels(range(4)), list("wxyz"), list("abcd"))
    with pytest.raises(ConfigError, match="has 3 classes; the images have 4 labels"):
        _ = open_tiny(pipelines, "dit", tmp_path / "c", many).train_images
    with pytest.raises(DataError, match="told the label of each image; 2 of 2 images"):
        run.open_queries(ImageData.from_arrays(make_images().pixels([0, 1]), ["x", "y"]))


def test_a_guidance_distilled_network_asks_for_its_scale(tmp_path: Path):
    save_pipeline("flux", tmp_path / "dev", guidance_embeds=True)
    with pytest.raises(ConfigError, match="told a guidance scale.*--guidance-scale"):
        _ = open_tiny(tmp_path, "dev", tmp_path / "out").train_images
    run = open_tiny(tmp_path, "dev", tmp_path / "other", guidance_scale=3.5)
    assert run.train_images.conditions([0])["guidance"].tolist() == [3.5]
    queries = make_images().select([0])
    run.trace(queries, ["grad-cos"], timesteps=2, draws=2, train_timesteps=1, show_progress=False)


def test_a_length_that_the_pipeline_does_not_take(pipelines: Path, tmp_path: Path):
    assert open_tiny(pipelines, "flux", tmp_path / "a", max_sequence_length=16).train_images.conditions([0])[
        "encoder_hidden_states"
    ].shape == (1, 16, 8)
    with pytest.raises(ConfigError, match="max_sequence_length has no effect on a StableDiffusionPipeline"):
        _ = open_tiny(pipelines, "sd", tmp_path / "b", max_sequence_length=16).train_images


def test_a_network_that_nothing_knows_how_to_call(tmp_path: Path):
    diffusers.UNet1DModel(sample_size=8, block_out_channels=(32, 32, 64)).save_pretrained(tmp_path / "unet")
    diffusers.DDPMScheduler().save_pretrained(tmp_path / "scheduler")
    with pytest.raises(UnsupportedModelError, match="calls models of class .*UNet2DModel.*; found UNet1DModel"):
        _ = open_tiny(tmp_path.parent, tmp_path.name, tmp_path / "out").train_images


# --- sampling


@pytest.mark.parametrize(("kind", "sampler"), [("sd", "ddim"), ("sd3", "euler"), ("flux", "euler"), ("dit", "ddim")])
def test_prompts_are_sampled_and_traced_along_their_path(pipelines: Path, tmp_path: Path, kind: str, sampler: str):
    run = open_tiny(pipelines, kind, tmp_path / "out")
    prompts = ["1", "2"] if kind == "dit" else ["a cat", "red car"]
    file = run.sample(1, prompts=prompts, steps=3, trajectory=True, show_progress=False)
    assert file.name.startswith(f"{sampler}3-1-seed0")
    queries = run.open_queries(file)
    assert queries.captions == tuple(prompts) and queries.pixels([0]).shape == (1, 3, 16, 16)
    assert queries.trajectories is not None and queries.trajectories.of_latents
    assert queries.trajectories.frames.shape == (2, 3, 4, 8, 8)
    journey = GradientPlan(output="loss", events=Trajectory(draws=2), unit="timestep")
    method = replace(method_by_name("grad-cos"), name="along", query=journey)
    found = run.trace(queries, [method], train_timesteps=2, phases=3, show_progress=False)["along"]
    assert np.isfinite(found.values).all() and found.phases.shape == (2, 3, 4)


def test_each_prompt_is_encoded_once_and_another_pipeline_samples_anew(pipelines: Path, tmp_path: Path, monkeypatch):
    run, texts = open_tiny(pipelines, "sd", tmp_path / "out"), []
    encode = PipelineEncoder.conditions
    monkeypatch.setattr(
        PipelineEncoder, "conditions", lambda self, some, size: texts.append(list(some)) or encode(self, some, size)
    )
    first = run.sample(3, prompts=["a cat", "red car"], steps=1, show_progress=False)
    assert texts[-1] == ["a cat", "red car"]
    other = shutil.copytree(pipelines / "sd", tmp_path / "other")
    config = json.loads((other / "vae" / "config.json").read_text()) | {"scaling_factor": 0.5}
    (other / "vae" / "config.json").write_text(json.dumps(config))
    again = open_tiny(pipelines, "sd", tmp_path / "out", base=str(other))
    assert again.sample(3, prompts=["a cat", "red car"], steps=1, show_progress=False) != first


def test_prompts_replace_the_captions_of_images_that_are_encoded_already(pipelines: Path, tmp_path: Path):
    run = open_tiny(pipelines, "sd", tmp_path / "out")
    encoded = run.train_images.select([0])
    assert run.open_queries(encoded) is not encoded  # joined, as any queries are
    assert run.open_queries(encoded).fingerprint == encoded.fingerprint
    told = run.open_queries(Queries([encoded], prompts=["red car"]))
    want = run.open_queries(replace(make_images().select([0]), captions=("red car",)))
    np.testing.assert_array_equal(*(one.conditions([0])["encoder_hidden_states"] for one in (told, want)))
    assert told.fingerprint == want.fingerprint != encoded.fingerprint


def test_queries_are_encoded_as_they_are_whatever_training_drew(pipelines: Path, tmp_path: Path):
    run = open_tiny(pipelines, "sd", tmp_path / "out")
    run.__dict__["encoding"] = replace(run.encoding, mirrored=True, drawn=True)
    trained, asked = run.train_images.encoding, run.open_queries(make_images().select([0])).encoding
    assert trained.mirrored is not None and trained.latents.deviation is not None
    assert asked.mirrored is None and asked.latents.deviation is None
    np.testing.assert_allclose(asked.latents.mean[0], trained.latents.mean[0], rtol=1e-3, atol=1e-6)


def test_what_is_said_of_a_model_is_kept_in_its_folder(pipelines: Path, tmp_path: Path):
    """Opened again by its model, it is what it was; what is said anew takes the place of what was said."""
    open_run(
        pipelines / "sd",
        data="demo",
        out=tmp_path / "out",
        conditioning={"caption": "a dog"},
        objective={"snr_gamma": 5.0},
    )
    again = open_run(pipelines / "sd", data="demo", out=tmp_path / "out", objective={"noise_offset": 0.1})
    assert again.conditioning.caption == "a dog"
    assert again.objective == ObjectiveSettings(snr_gamma=5.0, noise_offset=0.1)
    assert open_run(tmp_path / "out").objective == again.objective
    (tmp_path / "out" / "config.yaml").write_text("conditioning: {unheard_of: 1}")
    with pytest.raises(ConfigError, match="config.yaml is not a configuration of whence .*unheard_of.* left as it is"):
        open_run(pipelines / "sd", data="demo", out=tmp_path / "out")


def test_what_another_encoder_made_is_made_again(pipelines: Path, tmp_path: Path):
    foreign = open_tiny(pipelines, "sd3", tmp_path / "sd3").train_images.select([1])
    run = open_tiny(pipelines, "sd", tmp_path / "sd")
    assert run.open_queries(foreign).fingerprint == run.train_images.select([1]).fingerprint


def test_prompts_of_a_network_of_classes_are_labels(pipelines: Path, tmp_path: Path):
    run = open_tiny(pipelines, "dit", tmp_path / "out")
    told = run.open_queries(Queries([make_images().select([0, 1])], prompts=["2"]))
    assert told.conditions([0, 1])["class_labels"].tolist() == [2, 2]


def test_a_script_may_record_the_fingerprint_of_what_it_opened(pipelines: Path, tmp_path: Path):
    images, none = make_images(), Visits.from_table(SCHEMA.empty_table())
    record = Record(tmp_path, {"data_fingerprint": images.fingerprint, "config": {}}, (), none, none)
    encoded = open_tiny(pipelines, "sd", tmp_path / "out").train_images
    assert encoded.fingerprint != images.fingerprint
    check_same_data(record, encoded)
    with pytest.raises(RecordError, match="are not those that were trained on"):
        check_same_data(record, encoded.select([1, 0, 2, 3]))


def test_images_of_latents_are_not_drawn_again(pipelines: Path, tmp_path: Path):
    run = open_tiny(pipelines, "sd", tmp_path / "out")
    settings = CounterfactualSettings(top=(1,), seeds=(0, 1), trainer="own_trainers:save_shifted", timesteps=2)
    scores = run.trace(run.train_images.select([0]), ["pixels"], show_progress=False)
    plan = run.plan_counterfactual(run.train_images.select([0]), list(scores.values()), settings)
    assert plan.drawn == () and "samples latents, and a VAE makes images of them" in " ".join(plan.notes)


def test_paths_of_what_the_model_does_not_see_are_refused(pipelines: Path, tmp_path: Path):
    run = open_tiny(pipelines, "sd", tmp_path / "out")
    frames = np.zeros((1, 2, 3, 16, 16), np.float32)
    queries = replace(make_images().select([0]), trajectories=Trajectories(frames, (10, 20), ({},)))
    method = replace(method_by_name("grad-cos"), name="along", query=GradientPlan(Trajectory(draws=2)))
    with pytest.raises(ConfigError, match=r"of images of \(3, 16, 16\) .* the model sees latents of \(4, 8, 8\)"):
        run.trace(queries, [method], train_timesteps=2, show_progress=False)


def test_a_sampled_latent_is_what_the_pipeline_samples_from_the_same_noise(pipelines: Path, tmp_path: Path):
    """Against diffusers' own loop, without guidance."""
    from whence.diffusion.noise import noise_key, normals

    run = open_tiny(pipelines, "sd", tmp_path / "out")
    file = run.sample(1, prompts=["a cat"], steps=4, seed=3, show_progress=False)
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(pipelines / "sd", safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    noise = normals(noise_key(3, "trajectory", "query", "generated-0", 50), (4, 8, 8))
    made = pipeline(
        "a cat", latents=torch.from_numpy(noise)[None], num_inference_steps=4, guidance_scale=1.0, output_type="np"
    ).images
    ours = (run.open_queries(file).pixels([0]).transpose(0, 2, 3, 1) + 1) / 2
    np.testing.assert_allclose(ours, made, atol=1e-4)


def test_what_cannot_be_sampled_is_refused(pipelines: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="told captions; give at least one with --prompt"):
        open_tiny(pipelines, "sd", tmp_path / "a").sample(1)
    with pytest.raises(ConfigError, match="told nothing but the noisy image"):
        open_tiny(pipelines, "pixels", tmp_path / "b").sample(1, prompts=["a cat"])


def test_a_scheduler_of_another_kind_of_model_is_refused(pipelines: Path, tmp_path: Path):
    folder = shutil.copytree(pipelines / "sd3", tmp_path / "wrong")
    shutil.rmtree(folder / "scheduler")
    diffusers.DDPMScheduler(num_train_timesteps=50).save_pretrained(folder / "scheduler")
    run = open_tiny(tmp_path, "wrong", tmp_path / "out")
    with pytest.raises(UnsupportedModelError, match="SD3Transformer2DModel is trained by flow matching; .* epsilon"):
        run.subject.source(run.checkpoints[-1], _settings())


def with_config(run: Any, folder: Path, config: dict[str, Any]) -> Any:
    """Give a run a record without visits."""
    none = Visits.from_table(SCHEMA.empty_table())
    run.__dict__["record"] = Record(folder, {"config": config}, (), none, none)
    return run


def test_an_instance_prompt_on_record_is_told_of_every_training_image(pipelines: Path, tmp_path: Path):
    """As DreamBooth does, which reads no captions; queries keep theirs."""
    config = {"instance_prompt": "a photo of sks dog", "caption_column": None}
    run = with_config(open_tiny(pipelines, "sd", tmp_path / "out"), tmp_path, config)
    assert set(run.train_images.encoding.conditions.texts) == {"", "a photo of sks dog"}
    assert run.open_queries(make_images().select([1])).encoding.conditions.texts == ("", "a dog")


def test_another_vae_on_record_is_warned_of(pipelines: Path, tmp_path: Path):
    config = {"pretrained_vae_model_name_or_path": "someone/a-vae"}
    run = with_config(open_tiny(pipelines, "sd", tmp_path / "out"), tmp_path, config)
    with pytest.warns(UserWarning, match="Training encoded images by the VAE someone/a-vae; .* --base"):
        _ = run.encoding
    base = str(pipelines / "sd")
    assert with_config(open_tiny(pipelines, "sd", tmp_path / "2", base=base), tmp_path, config).encoding is not None


def test_class_images_of_prior_preservation_keep_their_prompt(pipelines: Path, tmp_path: Path):
    config = {"instance_prompt": "a cat", "class_prompt": "a dog", "with_prior_preservation": True}
    captions = ("a cat", "a dog", "a cat", "a dog")
    run = with_config(open_tiny(pipelines, "sd", tmp_path / "out", make_images(captions=captions)), tmp_path, config)
    conditions = run.train_images.encoding.conditions
    assert [conditions.texts[k] for k in conditions.of_row] == list(captions)
    for some in (("a cat", "", "a cat", ""), None):
        silent = with_config(open_tiny(pipelines, "sd", tmp_path / "2", make_images(captions=some)), tmp_path, config)
        with pytest.raises(DataError, match="instances 'a cat' and class images 'a dog'; [24] of 4 .* metadata.jsonl"):
            _ = silent.train_images
