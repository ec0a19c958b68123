"""Checkpoints: round trips, the folders of others, and the refusal of what is damaged or does not fit."""

import json
import shutil

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file

from whence.checkpoints import (
    WEIGHTS_FILE,
    check_files,
    check_same_architecture,
    list_checkpoints,
    load_model,
    load_scheduler,
    save_checkpoint,
)
from whence.errors import CheckpointError, NumericsError


def tiny_model(seed=0, **changed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UNet2DModel(
            **(
                {
                    "sample_size": 4,
                    "in_channels": 1,
                    "out_channels": 1,
                    "layers_per_block": 1,
                    "block_out_channels": (4,),
                    "down_block_types": ("DownBlock2D",),
                    "up_block_types": ("UpBlock2D",),
                    "norm_num_groups": 2,
                    "add_attention": False,
                }
                | changed
            )
        )


def tiny_scheduler():
    return DDPMScheduler(num_train_timesteps=20, prediction_type="v_prediction")


def same_weights(left, right):
    left, right = left.state_dict(), right.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def edit_weights(folder, change):
    """Rewrite a model's weights file; ``change`` alters the dict of tensors in place."""
    state = load_file(folder / WEIGHTS_FILE)
    change(state)
    save_file(state, folder / WEIGHTS_FILE, metadata={"format": "pt"})


@pytest.fixture
def saved(tmp_path):
    """One checkpoint of step 3 in a run."""
    return save_checkpoint(tmp_path / "run" / "checkpoints", 3, tiny_model(), tiny_scheduler())


class TestRoundTrip:
    def test_a_model_comes_back_bit_for_bit_in_evaluation_mode(self, saved):
        model = load_model(saved)
        assert type(model) is UNet2DModel and not model.training
        assert same_weights(model, tiny_model())
        check_files(saved)
        assert list_checkpoints(saved.folder.parent.parent) == [saved]

    def test_a_model_is_loaded_in_the_type_asked_for(self, saved):
        assert next(load_model(saved, dtype="float64").parameters()).dtype == torch.float64

    def test_the_scheduler_comes_back(self, saved):
        scheduler = load_scheduler(saved)
        assert type(scheduler) is DDPMScheduler
        assert (scheduler.config.num_train_timesteps, scheduler.config.prediction_type) == (20, "v_prediction")

    def test_resume_state_comes_back(self, tmp_path):
        tensors = {"optimizer": {"exp_avg.weight": torch.arange(3.0)}, "rng": {"torch": torch.arange(4).byte()}}
        saved = save_checkpoint(
            tmp_path, 1, tiny_model(), tiny_scheduler(), resume_tensors=tensors, resume_state={"last": [1, None]}
        )
        assert json.loads((saved.folder / "resume" / "state.json").read_text()) == {"last": [1, None]}
        for stem, want in tensors.items():
            found = load_file(saved.folder / "resume" / f"{stem}.safetensors")
            assert found.keys() == want.keys() and all(torch.equal(found[k], want[k]) for k in want)
        check_files(saved)

    def test_averaged_weights_are_kept_apart(self, tmp_path):
        model = tiny_model()
        ema = EMAModel(model.parameters(), decay=0.5, model_cls=UNet2DModel, model_config=model.config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1)
        saved = save_checkpoint(tmp_path, 1, model, tiny_scheduler(), ema=ema)
        assert same_weights(load_model(saved), model)
        assert same_weights(load_model(saved, "ema"), tiny_model())
        assert saved.content_hash("raw") != saved.content_hash("ema")
        check_same_architecture([saved], "ema")

    def test_averaged_weights_are_missed_by_name(self, saved):
        with pytest.raises(CheckpointError, match="checkpoint-3 has no averaged weights .* train with --ema-decay"):
            load_model(saved, "ema")

    def test_the_content_hash_depends_on_weights_and_configuration_alone(self, saved, tmp_path):
        twin = save_checkpoint(tmp_path / "twin", 8, tiny_model(), DDPMScheduler(), resume_state={})
        assert twin.content_hash() == saved.content_hash()
        other = save_checkpoint(tmp_path / "other", 3, tiny_model(seed=1), tiny_scheduler())
        assert other.content_hash() != saved.content_hash()


class TestFinding:
    def test_steps_are_in_the_order_of_numbers(self, tmp_path):
        for step in (10, 2, 9):
            save_checkpoint(tmp_path / "checkpoints", step, tiny_model(step), tiny_scheduler())
        found = list_checkpoints(tmp_path)
        assert [c.step for c in found] == [2, 9, 10]
        assert same_weights(load_model(found[2]), tiny_model(10))

    @pytest.mark.parametrize("place", ["run", "run/checkpoints", "run/checkpoints/checkpoint-3"])
    def test_a_run_its_checkpoints_or_one_of_them_may_be_given(self, saved, tmp_path, place):
        (found,) = list_checkpoints(tmp_path / place)
        assert (found.step, found.model_folder) == (3, saved.model_folder)

    def test_folders_of_diffusers_training_scripts(self, tmp_path):
        """As examples/unconditional_image_generation leaves them: accelerate's state beside the models."""
        for step in (500, 1000):
            folder = tmp_path / f"checkpoint-{step}"
            tiny_model(step).save_pretrained(folder / "unet")
            tiny_model(step + 1).save_pretrained(folder / "unet_ema")
            (folder / "optimizer.bin").write_bytes(b"accelerate")
            (folder / "random_states_0.pkl").write_bytes(b"accelerate")
        (tmp_path / "logs").mkdir()
        tiny_scheduler().save_pretrained(tmp_path / "scheduler")
        found = list_checkpoints(tmp_path)
        assert [c.step for c in found] == [500, 1000]
        assert same_weights(load_model(found[1]), tiny_model(1000))
        assert same_weights(load_model(found[1], "ema"), tiny_model(1001))
        assert load_scheduler(found[0]).config.prediction_type == "v_prediction"  # two folders up counts
        check_files(found[0])  # no checksums, nothing to compare

    def test_folders_of_a_transformer(self, tmp_path):
        for step in (500, 1000):
            tiny_model(step).save_pretrained(tmp_path / f"checkpoint-{step}" / "transformer")
            tiny_model(step + 1).save_pretrained(tmp_path / f"checkpoint-{step}" / "transformer_ema")
        found = list_checkpoints(tmp_path)
        assert same_weights(load_model(found[1]), tiny_model(1000))
        assert same_weights(load_model(found[1], "ema"), tiny_model(1001))

    def test_two_networks_in_one_folder_are_refused(self, tmp_path):
        for name in ("unet", "transformer"):
            tiny_model().save_pretrained(tmp_path / name)
        with pytest.raises(CheckpointError, match="holds both unet and transformer"):
            list_checkpoints(tmp_path)

    def test_a_pipeline_folder(self, tmp_path):
        DDPMPipeline(tiny_model(), tiny_scheduler()).save_pretrained(tmp_path / "pipeline")
        (found,) = list_checkpoints(tmp_path / "pipeline")
        assert (found.step, found.model_folder.name) == (0, "unet")
        assert same_weights(load_model(found), tiny_model())
        assert load_scheduler(found).config.num_train_timesteps == 20

    def test_a_lone_model_folder(self, tmp_path):
        tiny_model().save_pretrained(tmp_path / "model")
        (found,) = list_checkpoints(tmp_path / "model")
        assert (found.step, found.model_folder) == (0, tmp_path / "model")
        assert same_weights(load_model(found), tiny_model())
        with pytest.raises(CheckpointError, match=r"No scheduler/scheduler_config.json .* scheduler.save_pretrained"):
            load_scheduler(found)

    def test_folders_that_are_not_finished_are_left_out(self, saved):
        checkpoints = saved.folder.parent
        shutil.copytree(saved.folder, checkpoints / ".checkpoint-6.partial")
        (checkpoints / "checkpoint-9").mkdir()
        (checkpoints / "checkpoint-best").mkdir()
        (checkpoints / "checkpoint-12").write_text("a file")
        assert [c.step for c in list_checkpoints(checkpoints)] == [3]

    def test_two_folders_of_one_step_are_refused(self, saved):
        shutil.copytree(saved.folder, saved.folder.with_name("checkpoint-03"))
        with pytest.raises(CheckpointError, match="checkpoint-03 and .*checkpoint-3 have the same step"):
            list_checkpoints(saved.folder.parent)

    def test_an_empty_folder(self, tmp_path):
        with pytest.raises(CheckpointError, match="holds no checkpoint: expected checkpoint-<step>.*found nothing"):
            list_checkpoints(tmp_path)

    def test_a_folder_of_something_else(self, tmp_path):
        (tmp_path / "cat.png").touch()
        with pytest.raises(CheckpointError, match="found cat.png"):
            list_checkpoints(tmp_path)

    def test_what_is_not_a_folder(self, tmp_path):
        with pytest.raises(CheckpointError, match="is not a folder"):
            list_checkpoints(tmp_path / "missing")


class TestPickles:
    @pytest.fixture
    def pickled(self, tmp_path):
        tiny_model().save_pretrained(tmp_path / "unet", safe_serialization=False)
        return list_checkpoints(tmp_path)[0]

    def test_a_pickle_is_refused(self, pickled):
        with pytest.raises(CheckpointError, match=r"\.bin is a pickle, which can run code .* --allow-pickle"):
            load_model(pickled)

    def test_a_pickle_of_tensors_loads_when_allowed(self, pickled):
        assert same_weights(load_model(pickled, allow_pickle=True), tiny_model())

    def test_a_pickle_that_runs_code_does_not_run_it(self, pickled, tmp_path):
        class Bomb:
            def __reduce__(self):
                return (exec, (f"open({str(tmp_path / 'exploded')!r}, 'w')",))

        torch.save({"weight": Bomb()}, next(pickled.model_folder.glob("*.bin")))
        with pytest.raises(CheckpointError, match=r"was refused by torch.load\(weights_only=True\)"):
            load_model(pickled, allow_pickle=True)
        assert not (tmp_path / "exploded").exists()

    def test_safetensors_go_before_a_pickle(self, pickled):
        tiny_model(seed=1).save_pretrained(pickled.model_folder)
        assert same_weights(load_model(pickled), tiny_model(seed=1))

    @pytest.mark.parametrize(
        "damage, message",
        [
            (lambda b: b[: len(b) // 2], r"\.bin was refused .*: it is damaged, or no pickle of tensors"),
            (lambda b: b"", r"\.bin cannot be read: it is empty"),
            (lambda b: b"text", r"\.bin was refused .*: it is damaged, or no pickle of tensors"),
        ],
    )
    def test_a_damaged_pickle(self, pickled, damage, message):
        (path,) = pickled.model_folder.glob("*.bin")
        path.write_bytes(damage(path.read_bytes()))
        with pytest.raises(CheckpointError, match=message):
            load_model(pickled, allow_pickle=True)

    def test_a_refusal_does_not_pass_on_the_advice_to_run_code(self, pickled):
        torch.save({"weight": torch.nn.Linear(1, 1)}, next(pickled.model_folder.glob("*.bin")))
        with pytest.raises(CheckpointError, match=r"it holds torch.nn.modules.linear.Linear, which is no") as refusal:
            load_model(pickled, allow_pickle=True)
        assert "arbitrary code" not in str(refusal.value) and "False" not in str(refusal.value)

    @pytest.mark.parametrize(
        "content, message",
        [
            (
                {"epoch": 3, "state_dict": {"weight": torch.ones(1)}},
                "found a dict with the keys epoch, state_dict. Save",
            ),
            ({3: torch.ones(1)}, "found a dict with the keys 3. Save the model's"),
            ([torch.ones(1)], "must hold a dict of tensors by parameter name; found list"),
        ],
    )
    def test_a_pickle_of_something_else(self, pickled, content, message):
        torch.save(content, next(pickled.model_folder.glob("*.bin")))
        with pytest.raises(CheckpointError, match=message):
            load_model(pickled, allow_pickle=True)


class TestDamage:
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_a_weight_that_is_not_finite_is_named(self, saved, value):
        edit_weights(saved.model_folder, lambda state: state["conv_in.weight"].view(-1)[3:4].fill_(value))
        with pytest.raises(NumericsError, match=r"parameter conv_in.weight holds NaN or infinite values"):
            load_model(saved)

    @pytest.mark.parametrize("kept", [0, 4, 1000, -1])
    def test_truncated_weights(self, saved, kept):
        path = saved.model_folder / WEIGHTS_FILE
        path.write_bytes(path.read_bytes()[:kept])
        with pytest.raises(CheckpointError, match=f"{WEIGHTS_FILE} cannot be read"):
            load_model(saved)
        with pytest.raises(CheckpointError, match=f"{WEIGHTS_FILE} is damaged or was altered"):
            check_files(saved)

    @pytest.mark.parametrize("name", [f"unet/{WEIGHTS_FILE}", "unet/config.json", "scheduler/scheduler_config.json"])
    def test_one_altered_byte_is_found(self, saved, name):
        damaged = bytearray((saved.folder / name).read_bytes())
        damaged[-2] ^= 1
        (saved.folder / name).write_bytes(damaged)
        with pytest.raises(CheckpointError, match=f"{name} is damaged or was altered"):
            check_files(saved)

    def test_a_missing_file_is_found(self, saved):
        (saved.folder / "scheduler" / "scheduler_config.json").unlink()
        with pytest.raises(CheckpointError, match="scheduler_config.json is missing"):
            check_files(saved)

    @pytest.mark.parametrize("text", ["", '{"sha256": ', "[]"])
    def test_damaged_checksums(self, saved, text):
        (saved.folder / "checkpoint.json").write_text(text)
        with pytest.raises(CheckpointError, match="checkpoint.json (cannot be read|must hold)"):
            check_files(saved)

    @pytest.mark.parametrize("text", ["{}", '{"sha256": []}'])
    def test_missing_checksums(self, saved, text):
        (saved.folder / "checkpoint.json").write_text(text)
        with pytest.raises(CheckpointError, match="checkpoint.json has no checksums under sha256. It is damaged"):
            check_files(saved)

    def test_missing_weights(self, saved):
        (saved.model_folder / WEIGHTS_FILE).unlink()
        with pytest.raises(CheckpointError, match=f"has a config.json but no weights: expected {WEIGHTS_FILE}"):
            load_model(saved)

    @pytest.mark.parametrize("text", ["", "{", "[1]"])
    def test_a_damaged_configuration(self, saved, text):
        (saved.model_folder / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"unet/config.json (cannot be read|must hold)"):
            load_model(saved)

    @pytest.mark.parametrize("text", ["", "{", "[1]"])
    def test_a_damaged_scheduler(self, saved, text):
        (saved.folder / "scheduler" / "scheduler_config.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"scheduler_config.json (cannot be read|must hold)"):
            load_scheduler(saved)

    def test_a_missing_scheduler(self, saved):
        shutil.rmtree(saved.folder / "scheduler")
        with pytest.raises(CheckpointError, match="No scheduler/scheduler_config.json in .*checkpoint-3 or the two"):
            load_scheduler(saved)


class TestArchitecture:
    @pytest.mark.parametrize("name", [None, "NoSuchModel", "logging"])
    def test_a_class_that_diffusers_does_not_have(self, saved, name):
        path = saved.model_folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": name}))
        with pytest.raises(CheckpointError, match=f"names class {name!r}, unknown to diffusers"):
            load_model(saved)

    def test_a_class_that_is_not_a_model(self, saved):
        (saved.model_folder / "config.json").write_text('{"_class_name": "DDPMScheduler"}')
        with pytest.raises(
            CheckpointError, match="config.json must name a class of models; DDPMScheduler of diffusers"
        ):
            load_model(saved)

    def test_a_class_that_is_not_a_scheduler(self, saved):
        (saved.folder / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "UNet2DModel"}')
        with pytest.raises(CheckpointError, match="must name a class of schedulers; UNet2DModel of diffusers is not"):
            load_scheduler(saved)

    def test_a_scheduler_that_diffusers_does_not_have(self, saved):
        (saved.folder / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "NoSuchScheduler"}')
        with pytest.raises(CheckpointError, match="names class 'NoSuchScheduler'"):
            load_scheduler(saved)

    def test_a_configuration_that_its_class_does_not_understand(self, saved):
        path = saved.model_folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"down_block_types": ["NoSuchBlock"]}))
        with pytest.raises(CheckpointError, match=r"No UNet2DModel can be made from .*config.json: .*NoSuchBlock"):
            load_model(saved)

    def test_weights_of_another_architecture(self, saved, tmp_path):
        tiny_model(block_out_channels=(8,)).save_pretrained(tmp_path / "other")
        shutil.copy(tmp_path / "other" / WEIGHTS_FILE, saved.model_folder / WEIGHTS_FILE)
        with pytest.raises(
            CheckpointError,
            match=r"do not fit its config.json: conv_in.weight has shape \(8, 1, 3, 3\), the configuration asks for "
            r"\(4, 1, 3, 3\); .* and \d+ more. They belong to a model of another architecture",
        ):
            load_model(saved)

    def test_missing_and_surplus_weights(self, saved):
        edit_weights(saved.model_folder, lambda state: state.update(extra=state.pop("conv_in.bias")))
        with pytest.raises(CheckpointError, match="conv_in.bias is missing; extra is not part of the model"):
            load_model(saved)

    def test_a_series_of_two_architectures(self, saved, tmp_path):
        save_checkpoint(tmp_path / "run" / "checkpoints", 6, tiny_model(1, block_out_channels=(8,)), tiny_scheduler())
        checkpoints = list_checkpoints(tmp_path / "run")
        with pytest.raises(
            CheckpointError, match=r"checkpoint-6 differs from .*checkpoint-3: block_out_channels is \[8\], not \[4\]"
        ):
            check_same_architecture(checkpoints)

    def test_a_series_of_one_architecture(self, saved, tmp_path):
        save_checkpoint(tmp_path / "run" / "checkpoints", 6, tiny_model(1), tiny_scheduler())
        check_same_architecture(list_checkpoints(tmp_path / "run"))
