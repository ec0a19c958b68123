"""The README's Python runs as it stands there."""

import re
from pathlib import Path

import pytest
import torch

from conftest import TOY_MODEL, toy_images
from whence.config import DataSettings, ModelSettings, TrainingSettings
from whence.diffusion.objectives import sample_loss
from whence.opening import train_run
from whence.training import make_model, make_scheduler

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def demo_run(tmp_path, monkeypatch):
    """A run on the demo's images, much smaller than the demo's."""
    monkeypatch.chdir(tmp_path)
    train_run(
        "whence-demo",
        "demo",
        data_settings=DataSettings(resolution=8),
        model_settings=ModelSettings(widths=(8, 8), norm_groups=4),
        settings=TrainingSettings(epochs=1, batch_size=250, checkpoints=1),
        show_progress=False,
    )


def test_the_first_snippet_takes_at_most_ten_lines_and_runs(demo_run, capsys):
    assert len(SNIPPETS[0].strip().splitlines()) <= 10
    exec(SNIPPETS[0], {})
    assert capsys.readouterr().out.count("noto-") + 1 >= 8


def test_the_loop_snippet_makes_a_run_that_passes_its_check(tmp_path, monkeypatch):
    import whence
    from whence.data import save_arrays

    monkeypatch.chdir(tmp_path)
    data = toy_images(4)
    save_arrays(tmp_path / "images.safetensors", data.pixels(range(4)), data.ids)
    model, scheduler = make_model(TOY_MODEL, data, 0).train(), make_scheduler(TOY_MODEL)
    names = {"whence": whence, "model": model, "noise_scheduler": scheduler, "ids": data.ids}
    names["optimizer"] = torch.optim.SGD(model.parameters(), lr=0.1)
    make, draw, step, save = [line for line in SNIPPETS[1].splitlines() if line.strip()]
    exec(make, names)
    names["images"] = torch.from_numpy(data.pixels(range(4)))
    for turn in range(3):
        exec(draw, names)
        noisy = scheduler.add_noise(names["images"], names["noise"], names["timesteps"])
        names["loss"] = sample_loss(model(noisy, names["timesteps"]).sample, names["noise"], "mse")
        names["loss"].mean().backward()
        names["grad_norm"] = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        exec(step, names)
        names["optimizer"].step()
        names["optimizer"].zero_grad()
        if turn == 1:
            exec(save, names)
    names["recorder"].save(model)
    rows = whence.open_run("run", data=str(tmp_path / "images.safetensors")).check()
    assert [row.verdict for row in rows] == ["passed", "passed", "not checkable"]
