"""Encoders of every form against the models themselves, called by hand; what is cached; what is refused."""

import json
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DModel
from PIL import Image
from safetensors.torch import load_file, save_file

import whence.encoders
from conftest import toy_images
from whence.attribution import trace
from whence.checkpoints import list_checkpoints
from whence.config import TraceSettings
from whence.data import ImageData
from whence.encoders import find_encoder
from whence.errors import ConfigError, ScoresError
from whence.methods import CLIP, EMBEDDINGS, EMBEDDINGS_DOT, PIXELS, PIXELS_DOT, VAE, VAE_DOT
from whence.record import Record
from whence.similarity import score_baseline
from whence.subject import Subject

TRAIN, QUERIES = toy_images(5), toy_images(2, "query", seed=1)
SETTINGS = TraceSettings(block_size=2, batch_size=3)


def score(baseline, tmp_path, encoder=None, train=TRAIN, queries=QUERIES, settings=SETTINGS):
    """Score with an encoder by its name, and give the scores."""
    if encoder is not None:
        baseline = replace(baseline, encoder=encoder)
    encoders = {baseline: find_encoder(baseline, train)} if baseline.is_encoded else {}
    return score_baseline(baseline, encoders, train, queries, settings, tmp_path, show_progress=False)


def by_hand(features, product="cosine"):
    """Compare images one pair at a time; ``features`` takes one image, in float64."""
    train, asked = ([features(images.pixels([k])[0]) for k in range(len(images))] for images in (TRAIN, QUERIES))

    def compare(a, b):
        a, b = np.asarray(a, np.float64).ravel(), np.asarray(b, np.float64).ravel()
        return float(a @ b) / (np.linalg.norm(a) * np.linalg.norm(b) if product == "cosine" else 1.0)

    return np.array([[compare(a, b) for b in train] for a in asked])


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """A saved AutoencoderKL with a shift, and its folder."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    model = AutoencoderKL(block_out_channels=(4, 8), norm_num_groups=2, latent_channels=2, shift_factor=0.3, **blocks)
    folder = tmp_path_factory.mktemp("vae") / "pipeline" / "vae"
    model.save_pretrained(folder)
    return model.eval(), folder


def brightness(images):
    """An encoder: mean and spread of each channel."""
    return torch.cat([images.mean((2, 3)), images.std((2, 3)) + 1], 1)


class TestPixels:
    @pytest.mark.parametrize("baseline", [PIXELS, PIXELS_DOT])
    def test_against_pairs_of_images(self, baseline, tmp_path):
        found = score(baseline, tmp_path)
        np.testing.assert_allclose(found.values, by_hand(lambda image: image, baseline.product), rtol=1e-6)
        assert list(tmp_path.iterdir()) == []  # pixels are not kept a second time


class TestVae:
    @pytest.mark.parametrize("baseline", [VAE, VAE_DOT])
    @pytest.mark.parametrize("where", ["vae", "pipeline"])
    def test_latents_are_the_scaled_mode(self, vae, baseline, where, tmp_path):
        model, folder = vae
        exact: Any = AutoencoderKL.from_pretrained(folder, low_cpu_mem_usage=False).double()

        def latents(image):
            with torch.no_grad():
                moments = exact.quant_conv(exact.encoder(torch.from_numpy(image)[None].double()))
            return (moments[:, :2] - 0.3) * 0.18215  # of mean and log variance, the mean

        found = score(baseline, tmp_path, str(folder if where == "vae" else folder.parent))
        want = by_hand(latents, baseline.product)
        np.testing.assert_allclose(found.values, want, atol=1e-5 * np.abs(want).max())
        assert "latents (mode of the posterior, scaled) of AutoencoderKL" in found.notes[0]

    def test_channels_are_standardised_where_the_vae_says_how(self, vae, tmp_path):
        model, folder = vae
        mean, deviation = torch.tensor([0.5, -0.25]).view(-1, 1, 1), torch.tensor([4.0, 0.5]).view(-1, 1, 1)
        other = tmp_path / "vae"
        model.save_pretrained(other)
        config = json.loads((other / "config.json").read_text())
        config |= {"latents_mean": mean.flatten().tolist(), "latents_std": deviation.flatten().tolist()}
        (other / "config.json").write_text(json.dumps(config))

        def latents(image):
            with torch.no_grad():
                mode = model.encode(torch.from_numpy(image)[None]).latent_dist.mode()
            return (mode - mean) / deviation * 0.18215

        found, want = score(VAE_DOT, tmp_path / "run", str(other)), by_hand(latents, "dot")
        np.testing.assert_allclose(found.values, want, atol=1e-5 * np.abs(want).max())
        plain = find_encoder(replace(VAE, encoder=str(folder)), TRAIN)
        assert (
            "channels" in find_encoder(replace(VAE, encoder=str(other)), TRAIN).identity.keys() - plain.identity.keys()
        )

    def test_names_of_old_attention_weights(self, vae, tmp_path):
        _, folder = vae
        old = tmp_path / "old"
        old.mkdir()
        (old / "config.json").write_bytes((folder / "config.json").read_bytes())
        names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        state = load_file(folder / "diffusion_pytorch_model.safetensors")
        for new, was in names.items():
            state = {name.replace(f"attentions.0.{new}.", f"attentions.0.{was}."): w for name, w in state.items()}
        save_file(state, old / "diffusion_pytorch_model.safetensors")
        first, second = (score(VAE_DOT, tmp_path / f.name, str(f)) for f in (folder, old))
        np.testing.assert_array_equal(first.values, second.values)

    def test_grey_images_get_three_channels(self, vae, tmp_path):
        grey = TRAIN.pixels(range(5))[:, :1]
        as_grey = ImageData.from_arrays(grey, TRAIN.ids)
        as_rgb = ImageData.from_arrays(grey.repeat(3, 1), TRAIN.ids)
        found = [score(VAE, tmp_path, str(vae[1]), images, images).values for images in (as_grey, as_rgb)]
        np.testing.assert_array_equal(*found)

    def test_another_class_is_refused(self, tmp_path):
        channels = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
        UNet2DModel(sample_size=8, block_out_channels=(8,), norm_num_groups=4, **channels).save_pretrained(tmp_path)
        with pytest.raises(ConfigError, match="holds a UNet2DModel, no AutoencoderKL. It is a folder with a saved"):
            score(VAE, tmp_path, str(tmp_path))

    def test_missing_weights_are_refused(self, vae, tmp_path):
        (tmp_path / "config.json").write_bytes((vae[1] / "config.json").read_bytes())
        state = load_file(vae[1] / "diffusion_pytorch_model.safetensors")
        del state["quant_conv.weight"]
        save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
        with pytest.raises(ConfigError, match=r"lacks 1 of the model's weights \(quant_conv.weight\), which would be"):
            score(VAE, tmp_path, str(tmp_path))

    def test_damaged_weights_are_refused(self, vae, tmp_path):
        (tmp_path / "config.json").write_bytes((vae[1] / "config.json").read_bytes())
        with pytest.raises(ConfigError, match=r"The AutoencoderKL in .* cannot be loaded: .*safetensors"):
            score(VAE, tmp_path, str(tmp_path))


class TestFunctions:
    @pytest.mark.parametrize("baseline", [EMBEDDINGS, EMBEDDINGS_DOT])
    def test_a_callable(self, baseline, tmp_path):
        found = score(baseline, tmp_path, brightness)
        want = by_hand(lambda image: brightness(torch.from_numpy(image)[None]).double(), baseline.product)
        np.testing.assert_allclose(found.values, want, rtol=1e-5)

    def test_a_function_in_a_file(self, tmp_path):
        file = tmp_path / "mine.py"
        file.write_text("def means(images):\n    return images.mean((2, 3)).numpy()\n")
        found = score(EMBEDDINGS, tmp_path / "cache", f"{file}:means")
        np.testing.assert_allclose(found.values, by_hand(lambda image: image.mean((1, 2))), rtol=1e-4)
        with pytest.raises(ConfigError, match="has no function medians, which the encoder .* names; it has means"):
            score(EMBEDDINGS, tmp_path, f"{file}:medians")

    def test_a_function_in_a_module(self, tmp_path, monkeypatch):
        (tmp_path / "encoders_of_mine.py").write_text("def means(images):\n    return images.mean((2, 3))\n")
        monkeypatch.syspath_prepend(tmp_path)
        found = score(EMBEDDINGS, tmp_path / "cache", "encoders_of_mine:means")
        np.testing.assert_allclose(found.values, by_hand(lambda image: image.mean((1, 2))), rtol=1e-4)

    @pytest.mark.parametrize(
        ("function", "message"),
        [
            (lambda images: images, r"one row of floats for each image, .* gave float32 of shape \(4, 3, 8, 8\) for 4"),
            (lambda images: images.mean((2, 3))[:1], r"gave float32 of shape \(1, 3\) for 4 images"),
            (lambda images: images.flatten(1).numpy() > 0, "gave bool of shape"),
            (lambda images: images.flatten(1) / 0 * 0, "has values that are not finite for some of 4 images"),
            (lambda images: torch.rand(len(images), 3), "gives other features when it sees the same images again"),
        ],
    )
    def test_what_is_no_encoder(self, function, message, tmp_path):
        with pytest.raises(ConfigError, match=message):
            score(EMBEDDINGS, tmp_path, function)

    def test_another_function_of_one_name_is_another_encoder(self):
        def make(factor):
            def features(images):
                return images.flatten(1) * factor

            return find_encoder(replace(EMBEDDINGS, encoder=features), TRAIN).identity

        assert make(1.0) == make(1.0) != make(1.5)
        assert make(1.0)["name"] == make(1.5)["name"]


class TestRefusals:
    def test_no_encoder(self):
        with pytest.raises(ConfigError, match=r"none is named: give --encoder \(encoder=... in Python\). It is a fold"):
            find_encoder(EMBEDDINGS, TRAIN)
        with pytest.raises(ConfigError, match=r"vae compares what an encoder makes .* give --vae"):
            find_encoder(VAE, TRAIN)

    def test_nothing_there(self, tmp_path):
        with pytest.raises(ConfigError, match=r"There is no encoder '.*nowhere' for vae. It is a folder with a saved"):
            find_encoder(replace(VAE, encoder=str(tmp_path / "nowhere")), TRAIN)
        with pytest.raises(ConfigError, match="There is no encoder 'a:b' for clip"):
            find_encoder(replace(CLIP, encoder="a:b"), TRAIN)
        with pytest.raises(ConfigError, match="The encoder no_such_module:f cannot be imported: No module named"):
            find_encoder(replace(EMBEDDINGS, encoder="no_such_module:f"), TRAIN)

    def test_a_folder_without_a_model(self, tmp_path):
        with pytest.raises(ConfigError, match="holds no model: config.json cannot be read"):
            find_encoder(replace(VAE, encoder=str(tmp_path)), TRAIN)
        (tmp_path / "config.json").write_text('{"model_type": "vit"}')
        with pytest.raises(ConfigError, match="holds a model of type vit, no CLIP model. For any other encoder, use"):
            find_encoder(replace(CLIP, encoder=str(tmp_path)), TRAIN)
        with pytest.raises(ConfigError, match="has no preprocessor_config.json, which says how the model takes images"):
            find_encoder(replace(EMBEDDINGS, encoder=str(tmp_path)), TRAIN)

    def test_a_missing_package_is_named_with_the_command(self, tmp_path, monkeypatch):
        (tmp_path / "config.json").write_text('{"model_type": "clip"}')
        (tmp_path / "preprocessor_config.json").write_text("{}")
        monkeypatch.setitem(__import__("sys").modules, "transformers", None)
        with pytest.raises(ConfigError, match=re.escape("Install it: pip install 'whence[embeddings]'")):
            find_encoder(replace(CLIP, encoder=str(tmp_path)), TRAIN)


class TestHub:
    def test_only_an_id_of_the_hub_asks_it(self, vae, tmp_path, monkeypatch):
        asked = []
        monkeypatch.setattr(
            "huggingface_hub.snapshot_download", lambda name, **options: asked.append((name, options)) or str(vae[1])
        )
        here = find_encoder(replace(VAE, encoder=str(vae[1])), TRAIN)
        assert asked == []
        there = find_encoder(replace(VAE, encoder="hub:someone/vae@v1"), TRAIN)
        ((name, options),) = asked
        assert (name, options["revision"]) == ("someone/vae", "v1")
        assert there.identity == here.identity

    def test_what_it_refuses(self, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(ConfigError, match="hub:someone/clip cannot be had from the hub: .* give its folder"):
            find_encoder(replace(CLIP, encoder="hub:someone/clip"), TRAIN)


class TestCache:
    def test_training_images_are_encoded_once(self, tmp_path):
        seen = []

        def features(images):
            seen.append(len(images))
            return images.flatten(1)

        encoder = find_encoder(replace(EMBEDDINGS, encoder=features), TRAIN)

        def ask(baseline, queries):
            seen.clear()
            return score_baseline(
                baseline, {baseline: encoder}, TRAIN, queries, SETTINGS, tmp_path, show_progress=False
            )

        first = ask(EMBEDDINGS, QUERIES)
        assert seen == [2, 2, 2, 1]  # queries, then blocks of the training images
        ask(EMBEDDINGS_DOT, QUERIES)
        assert seen == []
        ask(EMBEDDINGS, toy_images(1, "other", seed=7))
        assert seen == [1]
        (tmp_path / next(iter(sorted(p.parent.name for p in tmp_path.glob("*/features-00000004*"))))).joinpath(
            "features-00000002.safetensors"
        ).unlink()
        np.testing.assert_array_equal(ask(EMBEDDINGS, QUERIES).values, first.values)
        assert seen == [2]  # the one block that was lost

    def test_other_images_are_others(self, tmp_path):
        first = score(EMBEDDINGS, tmp_path, brightness)
        changed = ImageData.from_arrays(-TRAIN.pixels(range(5)), TRAIN.ids)
        second = score(EMBEDDINGS, tmp_path, brightness, train=changed)
        assert not np.allclose(first.values, second.values)

    def test_damaged_files_are_refused(self, tmp_path):
        score(EMBEDDINGS, tmp_path, brightness)
        for path in tmp_path.rglob("features-*"):
            path.write_bytes(b"no features")
        with pytest.raises(ScoresError, match=r"features-00000000.safetensors is damaged"):
            score(EMBEDDINGS, tmp_path, brightness)
        for path in tmp_path.rglob("about.json"):
            path.write_text("{")
        with pytest.raises(ScoresError, match=r"about.json is damaged: .* Delete it"):
            score(EMBEDDINGS, tmp_path, brightness)


class TestTrace:
    @pytest.fixture
    def subject(self, toy_run, toy_train):
        return Subject(list_checkpoints(toy_run), toy_train, Record.open(toy_run / "record"), "mse")

    def test_settings_name_the_encoders_and_the_manifest_their_hashes(
        self, subject, toy_queries, vae, tmp_path, monkeypatch
    ):
        file = tmp_path / "mine.py"
        file.write_text("def flat(images):\n    return images.flatten(1)\n")
        settings = replace(SETTINGS, vae=str(vae[1]), encoder=f"{file}:flat")
        methods = [PIXELS, VAE, VAE_DOT, EMBEDDINGS]
        found = trace(subject, toy_queries, methods, settings, tmp_path / "run", show_progress=False)
        np.testing.assert_allclose(found["embeddings"].values, found["pixels"].values, atol=1e-6)
        manifest = json.loads((found["vae"].folder / "manifest.json").read_text())["details"]
        assert manifest["encoder"] == find_encoder(replace(VAE, encoder=str(vae[1])), TRAIN).identity
        assert manifest["encoder"]["class"] == "AutoencoderKL" and len(manifest["encoder"]["sha256"]) == 64
        assert manifest["computed_with"]["encoder"] == str(vae[1])
        moved = tmp_path / "moved"
        moved.symlink_to(vae[1])
        monkeypatch.setattr(whence.encoders, "_load_vae", lambda *a: pytest.fail("a VAE was loaded"))
        again = trace(subject, toy_queries, [VAE], replace(settings, vae=str(moved), encoder=None), tmp_path / "run")
        assert again["vae"].folder == found["vae"].folder

    def test_a_setting_without_effect_is_said(self, subject, toy_queries, tmp_path):
        with pytest.warns(UserWarning, match="clip has no effect: none of these methods is clip or clip-dot"):
            trace(subject, toy_queries, [PIXELS], replace(SETTINGS, clip="x"), tmp_path, show_progress=False)

    @pytest.mark.parametrize(
        ("field", "message"),
        [
            ("kind", "Unknown kind of baseline 'else'; known are pixels, vae, clip, embeddings, random"),
            ("product", "Unknown product 'else'; known are cosine, dot"),
        ],
    )
    def test_unknown_names(self, subject, toy_queries, tmp_path, field, message):
        declared = replace(PIXELS)
        object.__setattr__(declared, field, "else")  # the checks of the tests refuse it in the constructor
        with pytest.raises(ConfigError, match=message):
            trace(subject, toy_queries, [declared], SETTINGS, tmp_path)


@pytest.fixture(scope="module")
def transformers():
    """The package, where it is installed."""
    return pytest.importorskip("transformers")


class TestTransformers:
    """Real classes of transformers with random weights."""

    @pytest.fixture
    def processor(self, transformers):
        made = transformers.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
        mean, std = (np.array(x)[:, None, None] for x in (made.image_mean, made.image_std))

        def prepare(image):
            """Bring an image of floats to 16 x 16 and standardise it, with nothing but Pillow."""
            bytes_ = ((image.transpose(1, 2, 0) + 1) * 127.5).round().astype(np.uint8)
            large = Image.fromarray(bytes_).resize((16, 16), Image.Resampling.BICUBIC)
            return torch.from_numpy((np.asarray(large).transpose(2, 0, 1) / 255 - mean) / std)[None]

        return made, prepare

    SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    VISION = SIZES | {"image_size": 16, "patch_size": 4}

    def check(self, model, processor, features, folder, baseline, gives):
        """Save a model, score with it, and compare with the model itself in float64, an image at a time."""
        made, prepare = processor
        model.save_pretrained(folder)
        made.save_pretrained(folder)
        found = score(baseline, folder / "cache", str(folder))
        model = model.double().eval()
        with torch.no_grad():
            want = by_hand(lambda image: features(model, prepare(image)), baseline.product)
        np.testing.assert_allclose(found.values, want, atol=1e-5 * np.abs(want).max())
        assert gives in found.notes[0]

    @pytest.mark.parametrize("baseline", [CLIP, EMBEDDINGS_DOT])
    def test_image_features_of_clip(self, transformers, processor, baseline, tmp_path):
        text = self.SIZES | {"vocab_size": 50, "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 1}
        config = transformers.CLIPConfig(text_config=text, vision_config=self.VISION, projection_dim=12)

        def features(model, inputs):
            return model.visual_projection(model.vision_model(inputs).pooler_output)

        self.check(transformers.CLIPModel(config), processor, features, tmp_path, baseline, "image features of CLIPMo")

    def test_the_image_side_of_clip_alone(self, transformers, processor, tmp_path):
        model = transformers.CLIPVisionModelWithProjection(
            transformers.CLIPVisionConfig(**self.VISION, projection_dim=12)
        )

        def features(model, inputs):
            return model.visual_projection(model.vision_model(inputs).pooler_output)

        self.check(model, processor, features, tmp_path, CLIP, "image features of CLIPVisionModelWithProjection")

    def test_a_pooled_output(self, transformers, processor, tmp_path):
        model = transformers.Dinov2Model(transformers.Dinov2Config(**self.VISION))

        def features(model, inputs):
            return model(inputs).pooler_output

        self.check(model, processor, features, tmp_path, EMBEDDINGS, "pooled output of Dinov2Model")

    def test_a_pooler_without_weights_is_passed_over(self, transformers, processor, tmp_path):
        model = transformers.ViTForImageClassification(transformers.ViTConfig(**self.VISION))

        def features(model, inputs):
            return model.vit(inputs).last_hidden_state.mean(1)

        self.check(model, processor, features, tmp_path, EMBEDDINGS, "mean of the last hidden states of ViTModel")

    def test_missing_weights_are_refused(self, transformers, processor, tmp_path):
        transformers.Dinov2Model(transformers.Dinov2Config(**self.VISION)).save_pretrained(tmp_path)
        processor[0].save_pretrained(tmp_path)
        state = load_file(tmp_path / "model.safetensors")
        del state["layernorm.weight"]
        save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ConfigError, match=r"lacks 1 of the model's weights \(layernorm.weight\)"):
            score(EMBEDDINGS, tmp_path, str(tmp_path))

    def test_what_is_no_model_is_refused(self, transformers, processor, tmp_path):
        (tmp_path / "config.json").write_text('{"model_type": "no such model"}')
        processor[0].save_pretrained(tmp_path)
        with pytest.raises(ConfigError, match=r"The model in .* cannot be loaded: .*no such model"):
            score(EMBEDDINGS, tmp_path, str(tmp_path))

    def test_features_do_not_depend_on_the_batch(self, transformers, processor, tmp_path):
        transformers.Dinov2Model(transformers.Dinov2Config(**self.VISION)).save_pretrained(tmp_path)
        processor[0].save_pretrained(tmp_path)
        found = [
            score(EMBEDDINGS, tmp_path / f"{size}", str(tmp_path), settings=replace(SETTINGS, batch_size=size)).values
            for size in (1, 64)
        ]
        np.testing.assert_allclose(*found, atol=1e-6)
