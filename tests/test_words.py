"""Models that are told labels or words: training, withholding, replay, guidance, gradients."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from conftest import TOY_MODEL, TOY_TRAINING, toy_images
from whence.checkpoints import list_checkpoints, load_model, load_scheduler
from whence.config import DataSettings, ModelSettings, TrainingSettings
from whence.data import ImageData, open_images, save_arrays
from whence.diffusion.noise import derived_key, noise_key, normals, scalar_draws
from whence.encoding import own_encoding
from whence.errors import CheckpointError, ConfigError, DataError, RetrainingError
from whence.event_table import make_batch
from whence.methods import TRACIN
from whence.opening import open_run, train_run
from whence.sampling import sample_images
from whence.words import ClassEncoder, WordEncoder, encoder_of, words_of

CAPTIONS = [f"{colour} {thing}" for colour in ("red", "blue") for thing in ("cat", "dog", "sun", "key", "cup")]
LABELS = ["odd" if k % 5 == 4 else "even" for k in range(10)]
WORDS = replace(TOY_MODEL, condition="words", word_width=8, caption_words=4)
CLASSES = replace(TOY_MODEL, condition="label")
TRAINING = replace(TOY_TRAINING, caption_dropout=0.4)


def captioned(count: int = 10, prefix: str = "train", seed: int = 0) -> ImageData:
    return replace(toy_images(count, prefix, seed), captions=tuple(CAPTIONS[:count]))


def save(path, images: ImageData):
    save_arrays(path, images.pixels(range(len(images))), images.ids, images.labels, captions=images.captions)
    return str(path)


def trained(folder, model: ModelSettings, training: TrainingSettings = TRAINING):
    data = save(folder / "train.safetensors", captioned())
    return train_run(folder / "run", data, model_settings=model, settings=training, show_progress=False)


@pytest.fixture(scope="module")
def words_run(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("words"), WORDS)


@pytest.fixture(scope="module")
def label_run(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("label"), CLASSES)


# --- encoders


def test_a_word_is_the_normals_of_its_key_and_a_caption_is_filled_up():
    encoder = WordEncoder(width=6, length=4, seed=3)
    found = encoder.conditions(["Red  CAT,", ""])["encoder_hidden_states"]
    of = {word: normals(noise_key(3, "word", "train", word, 0), (6,)) for word in ("red", "cat", "")}
    assert found.shape == (2, 4, 6) and found.dtype == np.float32
    assert np.array_equal(found[0], np.stack([of["red"], of["cat"], of[""], of[""]]))
    assert np.array_equal(found[1], np.stack([of[""]] * 4))


def test_words_are_runs_of_letters_and_digits_of_any_script():
    assert words_of("T-Rex’s 2nd_häuser, 猫") == ["t", "rex", "s", "2nd", "häuser", "猫"]


def test_encoders_differ_in_their_hash_where_they_differ():
    encoders = [WordEncoder(), WordEncoder(width=8), WordEncoder(length=8), WordEncoder(seed=1)]
    encoders += [ClassEncoder(("a", "b")), ClassEncoder(("b", "a"))]
    assert len({encoder.hash for encoder in encoders}) == len(encoders)


def test_a_caption_that_is_too_long_is_named():
    with pytest.raises(DataError, match="may have 3 words; 'one two three four' has 4.*--caption-words"):
        WordEncoder(length=3).conditions(["one two three four"])


def with_words(images: ImageData, encoder: WordEncoder) -> ImageData:
    encoding = own_encoding(encoder)
    assert encoding is not None
    return encoding.encode(images, None)


def with_classes_told(images: ImageData, classes: list[str]) -> ImageData:
    encoding = own_encoding(ClassEncoder(tuple(classes), withheld=len(classes)))
    assert encoding is not None
    return encoding.encode(images, None)


def test_conditions_stand_beside_images_once_for_each_caption():
    images = replace(toy_images(3), captions=("a b", "", "a b"))
    encoding = with_words(images, WordEncoder(width=4, length=2)).encoding
    assert encoding is not None and encoding.conditions is not None
    assert encoding.conditions.texts == ("", "a b") and encoding.conditions.of_row.tolist() == [1, 0, 1]
    assert encoding.conditions.withheld == 0
    numbered = with_classes_told(toy_images(5), ["odd", "even"]).conditions([4, 0], np.array([False, True]))
    assert numbered["class_labels"].tolist() == [0, 2]  # the number after the last label: withheld


def test_images_without_captions_or_with_unknown_labels_are_refused():
    with pytest.raises(
        DataError, match="told the caption of each image; 2 of 2 images of memory have none.*--caption-column"
    ):
        with_words(toy_images(2), WordEncoder())
    with pytest.raises(DataError, match="knows the labels odd; found 'even'"):
        with_classes_told(toy_images(2), ["odd"])
    with pytest.raises(DataError, match="told the label of each image; 2 of 2 images of memory have none"):
        with_classes_told(replace(toy_images(2), labels=None), ["odd"])


def test_the_fingerprint_tells_captions_apart():
    images = with_words(captioned(), WordEncoder())
    other = with_words(replace(captioned(), captions=(*CAPTIONS[:-1], "else")), WordEncoder())
    assert images.hashes == other.hashes and images.fingerprint != other.fingerprint != captioned().fingerprint
    assert images.seen_hashes[:-1] == other.seen_hashes[:-1]


# --- training


def test_checkpoints_say_what_their_model_is_told(words_run, label_run):
    for checkpoint in list_checkpoints(words_run.folder):
        assert encoder_of(checkpoint.folder) == WordEncoder(8, 4)
        assert "words.json" in json.loads((checkpoint.folder / "checkpoint.json").read_text())["sha256"]
        assert type(load_model(checkpoint)).__name__ == "UNet2DConditionModel"
    for checkpoint in list_checkpoints(label_run.folder):
        assert encoder_of(checkpoint.folder) == ClassEncoder(("even", "odd"), withheld=2)
        assert load_model(checkpoint).config["num_class_embeds"] == 3
    assert label_run.record.manifest["config"]["model"]["classes"] == ["even", "odd"]


def test_a_damaged_file_of_words_is_named(words_run, tmp_path):
    (tmp_path / "words.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"words\.json cannot be read"):
        encoder_of(tmp_path)
    (tmp_path / "words.json").write_text('{"format_version": 99, "width": 8, "length": 4, "seed": 0}')
    with pytest.raises(CheckpointError, match="format version 99"):
        encoder_of(tmp_path)


@pytest.mark.parametrize("kind", ["words_run", "label_run"])
def test_captions_are_withheld_by_key_and_the_record_replays(kind, request):
    run = request.getfixturevalue(kind)
    visits = run.record.visits
    want = [scalar_draws(derived_key(int(key), "dropped"))[0] < 0.4 for key in visits.noise_key]
    assert visits.condition_dropped.tolist() == want and 0 < sum(want) < len(want)
    assert {row.verdict for row in run.check()} == {"passed"}


def test_an_altered_withholding_far_from_any_checkpoint_fails_the_check_of_keys(words_run):
    from whence.replay_check import check_run

    record = words_run.record
    dropped = record.visits.condition_dropped.copy()
    dropped[1] = ~dropped[1]
    record = replace(record, visits=replace(record.visits, condition_dropped=dropped))
    found = check_run(replace(words_run.subject, record=record))
    assert [row.verdict for row in found] == ["failed", *["passed"] * (len(found) - 1)]
    assert "step 1, " in found[0].detail and "withheld caption or label" in found[0].detail


@pytest.mark.parametrize("column", ["captions", "withheld"])
def test_other_captions_or_withheld_ones_fail_the_replay(words_run, column):
    record, train = words_run.record, words_run.train_images
    step = words_run.subject.checkpoints[0].step + 1
    if column == "withheld":
        dropped = np.where(
            record.visits.step == step, ~record.visits.condition_dropped, record.visits.condition_dropped
        )
        record = replace(record, visits=replace(record.visits, condition_dropped=dropped))
    else:
        shuffled = replace(captioned(), captions=tuple(CAPTIONS[::-1]))
        train = with_words(shuffled, WordEncoder(8, 4))
        manifest = record.manifest | {"data_fingerprint": train.fingerprint}
        record = replace(record, manifest=manifest)
    from whence.replay_check import check_run

    found = check_run(replace(words_run.subject, record=record, train=train))
    assert found[1].verdict == "failed"


def test_without_dropout_nothing_is_withheld(tmp_path):
    run = trained(tmp_path, WORDS, replace(TRAINING, caption_dropout=0.0, epochs=1, checkpoints=1))
    assert run.record is not None and not run.record.visits.condition_dropped.any()


def test_a_killed_training_goes_on_to_the_same_weights(words_run, tmp_path):
    import shutil

    run = trained(tmp_path, WORDS)
    last = list_checkpoints(run.folder)[-1]
    shutil.rmtree(last.folder)
    run = trained(tmp_path, WORDS)
    assert list_checkpoints(run.folder)[-1].content_hash() == list_checkpoints(words_run.folder)[-1].content_hash()


def test_records_of_unconditional_models_are_as_they_were(toy_run):
    config = json.loads((toy_run / "record" / "manifest.json").read_text())["config"]
    assert "caption_dropout" not in config and "condition" not in config["model"]


@pytest.mark.parametrize(
    ("model", "training", "message"),
    [
        (replace(WORDS, caption_words=0), TRAINING, "caption_words must be above 0"),
        (replace(WORDS, attention_levels=0, widths=(8, 12)), TRAINING, "width with attention must be a multiple of 8"),
        (replace(WORDS, classes=("a",)), TRAINING, "classes are of a model that is told labels"),
        (replace(CLASSES, classes=("a", "a")), TRAINING, "classes must be different labels"),
        (WORDS, replace(TRAINING, caption_dropout=1.0), "caption_dropout must be at least 0 and below 1"),
    ],
)
def test_settings_that_cannot_be_met(tmp_path, model, training, message):
    with pytest.raises(ConfigError, match=message):
        trained(tmp_path, model, training)
    assert not (tmp_path / "run").exists()


def test_a_label_model_needs_labels_and_a_word_model_captions(tmp_path):
    images = replace(toy_images(10), labels=None)
    data = save(tmp_path / "train.safetensors", images)
    with pytest.raises(ConfigError, match="condition label: the images of .* have no labels"):
        train_run(tmp_path / "run", data, model_settings=CLASSES, settings=TRAINING, show_progress=False)
    with pytest.raises(DataError, match="told the caption of each image"):
        train_run(tmp_path / "run", data, model_settings=WORDS, settings=TRAINING, show_progress=False)
    assert not (tmp_path / "run").exists()


# --- gradients


@pytest.mark.parametrize("kind", ["words_run", "label_run"])
def test_scores_are_those_of_autograd(kind, request, tmp_path):
    """TracIn at the last checkpoint, event by event, with the conditions that each visit had."""
    run = request.getfixturevalue(kind)
    queries = run.open_queries(captioned(2, "query", seed=1))
    scores = run.trace(queries, "tracin", timesteps=2, draws=2, show_progress=False)["tracin"]
    process, total = run.subject.process, np.zeros_like(scores.values, dtype=np.float64)
    for checkpoint in run.subject.checkpoints:
        model = load_model(checkpoint).double().eval()

        def gradients(table, images, model=model):
            batch = make_batch(table, images, process, dtype=torch.float64)
            found = []
            for k in range(len(table)):
                one = batch.take(slice(k, k + 1))
                told = one.conditions
                prediction = (
                    model(one.noisy, one.times, told["encoder_hidden_states"]).sample
                    if "encoder_hidden_states" in told
                    else model(one.noisy, one.times, class_labels=told["class_labels"]).sample
                )
                loss = (prediction - one.target).square().mean()
                parts = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
                pairs = zip(parts, model.parameters(), strict=True)
                found.append(torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs]))
            return torch.stack(found).numpy()

        after = run.subject.previous_step[checkpoint.step]
        table = run.subject.replays.events(after, checkpoint.step, TRACIN.train.events, "learning_rate")
        of_train = gradients(table, run.train_images) * table.weight[:, None]
        from whence.event_table import grid_events
        from whence.methods import Grid

        grid = grid_events(queries, [0, 1], "query", Grid(2, 2), process.num_timesteps, 0)
        of_query = gradients(grid, queries).reshape(2, 4, -1).mean(axis=1)
        for row, vector in zip(table.row, of_train, strict=True):
            total[:, row] += of_query @ vector
        assert not kind.startswith("words") or table.dropped.any()
    np.testing.assert_allclose(scores.values, total, rtol=2e-4, atol=2e-4 * np.abs(total).max())


def test_an_index_tells_captions_apart(words_run):
    from whence.indexing import content_hashes

    one, other = (
        words_run.open_queries(replace(captioned(2), captions=texts)) for texts in (("red", "cat"), ("red", "dog"))
    )
    found = [content_hashes(images) for images in (one, other)]
    assert found[0][0] == found[1][0] and found[0][1] != found[1][1]


# --- sampling


def test_prompts_become_captions_of_what_is_sampled(words_run):
    path = words_run.sample(2, prompts=["red cat", "a word unheard of"], steps=3, trajectory=True, show_progress=False)
    images = open_images(path)
    assert images.captions == ("red cat", "red cat", "a word unheard of", "a word unheard of")
    assert images.trajectories is not None
    assert [one["prompt"] for one in images.trajectories.about] == list(images.captions)
    other = words_run.sample(2, prompts=["blue key"], steps=3, show_progress=False)
    assert other != path and not np.allclose(open_images(other).pixels([0]), images.pixels([0]))
    scores = words_run.trace(path, "tracin", timesteps=1, draws=2, show_progress=False)["tracin"]
    assert scores.query_ids == images.ids


def test_prompts_of_a_label_model_are_labels(label_run):
    path = label_run.sample(1, prompts=["odd", ""], steps=2, show_progress=False)
    images = open_images(path)
    assert images.labels == ("odd", "") and label_run.open_queries(path).conditions([0, 1])[
        "class_labels"
    ].tolist() == [
        1,
        2,
    ]
    with pytest.raises(DataError, match="knows the labels even, odd; found 'red cat'"):
        label_run.sample(1, prompts=["red cat"], steps=2, show_progress=False)


def test_guidance_is_the_formula(words_run):
    """The first step of DDIM, by hand, from predictions with and without the caption."""
    checkpoint = list_checkpoints(words_run.folder)[-1]
    model, scheduler = load_model(checkpoint), load_scheduler(checkpoint)
    encoder = encoder_of(checkpoint.folder)
    assert encoder is not None
    told, empty = (
        {name: torch.from_numpy(v) for name, v in encoder.conditions([text]).items()} for text in ("red cat", "")
    )

    def sample(**options):
        return sample_images(model, scheduler, ["made"], steps=1, seed=5, show_progress=False, **options)

    import diffusers

    ddim = diffusers.DDIMScheduler.from_config(scheduler.config, clip_sample=True)
    ddim.set_timesteps(1)
    noise = torch.from_numpy(normals(noise_key(5, "trajectory", "query", "made", 50), (3, 8, 8)))[None]
    with torch.no_grad():
        time = ddim.timesteps[0]
        with_it, without = (model(noise, time, c["encoder_hidden_states"]).sample for c in (told, empty))
        want = ddim.step(without + 3.0 * (with_it - without), time, noise, eta=0.0).prev_sample.clip(-1, 1)
    guided = sample(conditions=told, withheld=empty, guidance_scale=3.0)
    np.testing.assert_allclose(guided, want, rtol=1e-5, atol=1e-6)
    plain = sample(conditions=told)
    assert not np.array_equal(plain, guided)
    assert np.array_equal(plain, sample(conditions=told, withheld=empty))  # a scale of 1 is the model's own
    with pytest.raises(ConfigError, match="guidance_scale is 2"):
        sample(conditions=told, guidance_scale=2.0)
    with pytest.raises(ConfigError, match="guidance_scale must be finite"):
        sample(conditions=told, withheld=empty, guidance_scale=float("nan"))


def test_prompts_that_do_not_fit_the_model_are_refused(toy_run, toy_train, words_run, tmp_path):
    data = save(tmp_path / "plain.safetensors", toy_train)
    plain = open_run(toy_run, data=data, out=tmp_path / "out")
    with pytest.raises(ConfigError, match="told nothing but the noisy image"):
        plain.sample(1, prompts=["red cat"], steps=2, show_progress=False)
    with pytest.raises(ConfigError, match="guidance_scale is 2"):
        plain.sample(1, guidance_scale=2.0, steps=2, show_progress=False)
    with pytest.raises(ConfigError, match="told captions; give at least one with --prompt"):
        words_run.sample(1, steps=2, show_progress=False)
    with pytest.raises(DataError, match="may have 4 words"):
        words_run.sample(1, prompts=["one two three four five"], steps=2, show_progress=False)


def test_the_command_line_takes_several_prompts(words_run, capsys):
    from whence.cli import main

    main(
        ["sample", str(words_run.folder), "--count", "1", "--steps", "2", "--prompt", "red cat", "--prompt", "blue sun"]
    )
    assert open_images(capsys.readouterr().out.strip()).captions == ("red cat", "blue sun")


# --- training again


@pytest.mark.parametrize("kind", ["words_run", "label_run"])
def test_models_are_retrained_with_their_captions(kind, request, tmp_path):
    run = request.getfixturevalue(kind)
    queries = save(tmp_path / "queries.safetensors", captioned(2, "query", seed=1))
    truth = run.retrain(
        {"held": queries}, subsets=2, seeds=(0,), timesteps=2, draws=2, keep_models=True, epochs=1, show_progress=False
    )
    assert truth.output("loss").shape[:2] == (2, 1) and np.isfinite(truth.output("loss")).all()
    models = sorted(run.folder.glob("retraining/*/models/subset-*"))
    assert len(models) == 2
    for model in models:
        assert encoder_of(list_checkpoints(model)[-1].folder) == encoder_of(run.subject.checkpoints[-1].folder)


def test_a_trainer_that_numbers_labels_otherwise_is_refused(label_run, tmp_path):
    queries = save(tmp_path / "queries.safetensors", captioned(2, "query", seed=1))
    with pytest.raises(RetrainingError, match="knows other labels, .* than the run's"):
        label_run.retrain(
            {"held": queries},
            trainer="own_trainers:save_renumbered",
            subsets=1,
            seeds=(0,),
            timesteps=2,
            show_progress=False,
        )


def test_opening_a_caption_file_keeps_captions(tmp_path):
    images = captioned(3)
    found = open_images(save(tmp_path / "x.safetensors", images), DataSettings())
    assert found.captions == images.captions and found.labels == images.labels
