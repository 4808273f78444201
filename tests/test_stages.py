"""GCL's stages one after another, from Python and from the command line."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from bodied import SIZE, data, part_encoder
from PIL import Image

from pyreid import cli, demo, models, people, stages, train
from pyreid.data import save_meshes, transforms
from pyreid.methods import GCL, METHODS
from pyreid.stages import train_stages

CONFIG = GCL.Config(
    generator_width=1,
    discriminator_width=2,
    discriminator_scales=2,
    k1=4,
    k2=2,
    rho=0.1,
    min_samples=2,
)
WARMUP = METHODS["scl"].Config(neighbours=2, negatives=5)


def trainings(**changes):
    common = {"epochs": 1, "steps": 2, "batch_size": 4, "height": 16, "width": 8} | changes
    return {stage: train.Training(**stages.recipe(stage, WARMUP) | common) for stage in (1, 2, 3)}


def trained(output=None, **options):
    common = {"warmup": WARMUP, "trainings": trainings(), "output": output}
    return train_stages(part_encoder(), data(), CONFIG, **common | options)


def weights(network):
    return {name: value.clone() for name, value in network.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def test_each_stage_begins_with_the_end_of_the_one_before(tmp_path):
    found = trained(tmp_path)
    assert list(found) == [1, 2, 3]
    first, second, third = (torch.load(tmp_path / f"stage{k}/last.pt") for k in (1, 2, 3))
    assert same(first, second)
    assert not same(second, third)
    assert same(third, weights(found[3].result.encoder))
    for stage in (2, 3):
        for name in stages.BESIDE:
            kept = torch.load(tmp_path / f"stage{stage}/{name}.pt")
            assert same(kept, torch.load(tmp_path / f"stage3/{name}.pt")) == (stage == 3)
    assert found[2].result.before is None
    assert found[3].result.evaluation is not None
    settings = json.loads((tmp_path / "stage2/config.json").read_text())
    assert settings["stage"] == settings["method"]["stage"] == "2"


def test_stages_by_themselves_are_those_of_all(tmp_path):
    trained(tmp_path / "all")
    for stage in (1, 2, 3):
        trained(tmp_path / "each", stages=(stage,))
    for name in ("last", *stages.BESIDE):
        ends = [torch.load(tmp_path / f"{run}/stage3/{name}.pt") for run in ("all", "each")]
        assert same(*ends), name


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_stopped_stage_goes_on(cut, tmp_path, monkeypatch):
    trained(tmp_path / "whole")
    steps = 0
    for cls in (METHODS["scl"], GCL):

        def counted(self, batch, update=cls.update):
            nonlocal steps
            update(self, batch)
            steps += 1
            if steps == 2 * cut - 1:
                raise KeyboardInterrupt

        monkeypatch.setattr(cls, "update", counted)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "cut")
    monkeypatch.undo()
    if cut > 1:
        with pytest.raises(ValueError, match=r"stage1 holds a run; resume it"):
            trained(tmp_path / "cut")
    trained(tmp_path / "cut", resume=True)
    for name in ("last", *stages.BESIDE):
        ends = [torch.load(tmp_path / f"{run}/stage3/{name}.pt") for run in ("whole", "cut")]
        assert same(*ends), name


def test_a_stage_may_begin_with_what_is_given():
    encoder = part_encoder(seed=3)
    before = weights(encoder)
    generator = models.Generator(encoder.appearance_dim, 1)
    found = train_stages(
        encoder, data(), CONFIG, stages=(2,), trainings=trainings(), generator=generator
    )
    assert found[2].method.generator is generator
    assert same(before, weights(found[2].result.encoder))


def test_the_first_stage_is_jvtc_by_default():
    changes = {"epochs": 1, "steps": 2, "batch_size": 4, "height": 16, "width": 8}
    training = train.Training(**stages.recipe(1) | changes)
    found = train_stages(part_encoder(), data(), stages=(1,), trainings={1: training})
    assert isinstance(found[1].method, METHODS["jvtc"])
    assert stages.recipe(1) == METHODS["jvtc"].recipe
    assert stages.recipe(1, "cluster-contrast", "msmt17")["steps"] == 400
    assert stages.recipe(2)["epochs"] == 40
    assert stages.recipe(3)["epochs"] == 20


def test_wrong_arguments_are_named():
    for wrong in ((), (2, 1), (4,)):
        with pytest.raises(ValueError, match="stages must be some of 1, 2, 3 in order"):
            trained(stages=wrong)
    with pytest.raises(ValueError, match="data must have MeshedImages"):
        train_stages(part_encoder(), data().stills(), CONFIG, stages=(2,))


FLAGS = [
    *("--method", "gcl", "--warmup", "scl", "--encoder", "small", "--weights", "random"),
    *("--embedding", "16", "--height", "32", "--width", "16", "--epochs", "1", "--steps", "2"),
    *("--batch-size", "4", "--k1", "6", "--k2", "2", "--min-samples", "2", "--rho", "0.1"),
    *("--generator-width", "1", "--discriminator-width", "2", "--discriminator-scales", "2"),
]


def test_the_command(tmp_path, capsys):
    output = str(tmp_path / "run")
    run = ["train", *FLAGS, "--people", "4", "-o", output]
    assert cli.main([*run, "--stage", "1"]) == 0
    assert cli.main([*run, "--stage", "2", "--weights", str(tmp_path / "a.pt")]) == 2
    assert "is what the stage would begin with" in capsys.readouterr().err
    assert cli.main([*run, "--stage", "2"]) == 0
    first, second = (torch.load(tmp_path / f"run/stage{k}/last.pt") for k in (1, 2))
    assert same(first, second)
    generator = str(tmp_path / "run/stage2/generator.pt")
    elsewhere = [*FLAGS, "--stage", "3", "--people", "4", "-o", str(tmp_path / "other")]
    first = str(tmp_path / "run/stage1/last.pt")
    elsewhere[elsewhere.index("random")] = first
    assert cli.main(["train", *elsewhere, "--generator", generator]) == 0
    page = (tmp_path / "other/report.html").read_text()
    assert "Generated views" in page
    assert (tmp_path / "other/stage3/generator.pt").exists()
    assert cli.main(["eval", str(tmp_path / "other/stage3/last.pt"), "--people", "4"]) == 0


def test_the_command_on_photos_takes_meshes(tmp_path, capsys):
    photos = data(people=4).train.photos
    folder = tmp_path / "photos"
    folder.mkdir()
    for row, name in enumerate(photos.names):
        photos[row][0].save(folder / f"{name}.png")
    run = ["train", *FLAGS, "--images", str(folder), "--stage", "2", "-o", str(tmp_path / "run")]
    assert cli.main(run) == 2
    assert "pyreid mesh" in capsys.readouterr().err
    bodies = np.zeros((len(photos), 8, *SIZE), np.uint8)
    bodies[..., 4:, :] = 255
    save_meshes(tmp_path / "bodies.npz", photos.names, bodies)
    assert cli.main([*run, "--meshes", str(tmp_path / "bodies.npz")]) == 0
    again = ["train", "--config", str(tmp_path / "run/config.json"), "-o", str(tmp_path / "run")]
    assert cli.main([*again, "--resume"]) == 0
    assert cli.main([*again, "--resume", "--stage", "3"]) == 0


def test_the_demo(tmp_path, monkeypatch, capsys):
    drawn = people.People(ids=4, test_ids=3, cameras=2, images=4, height=32, width=16)
    monkeypatch.setattr(demo, "PEOPLE", drawn)
    monkeypatch.setattr(demo, "WARMUP", WARMUP)
    tiny = {"epochs": 1, "steps": 2, "batch_size": 4, "height": 32, "width": 16}
    changed = {k: dataclasses.replace(t, **tiny) for k, t in demo.GCL_TRAININGS.items()}
    monkeypatch.setattr(demo, "GCL_TRAININGS", changed)
    networks = {"generator_width": 1, "discriminator_width": 2, "k1": 6, "k2": 2, "rho": 0.1}
    config = dataclasses.replace(demo.GCL_CONFIG, min_samples=2, **networks)
    monkeypatch.setattr(demo, "GCL_CONFIG", config)
    assert demo.main(str(tmp_path), "gcl") == 0
    assert "Generated views" in (tmp_path / "report.html").read_text()
    found = json.loads((tmp_path / "views.json").read_text())
    assert set(found) == {
        *("generated", "copied", "generated, body", "copied, body", "reconstructed")
    }
    assert "within the body's silhouette" in capsys.readouterr().out
    with Image.open(tmp_path / "views.png") as sheet:
        assert sheet.width > 10 * 64


def test_figures_of_views_know_what_is_right():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 256, (2, 8, 16, 8, 3), np.uint8)
    photos, bodies = truth[:, 0], np.ones((2, 8, 16, 8), bool)
    perfect = demo.Views(photos, truth, truth, photos, bodies).figures()
    for name in ("generated", "generated, body", "reconstructed"):
        assert perfect[name] == pytest.approx(1)
    assert perfect["copied"] == pytest.approx(perfect["copied, body"])
    assert perfect["copied"] < 0.3
    copied = np.broadcast_to(photos[:, None], truth.shape)
    lazy = demo.Views(photos, copied, truth, photos, bodies).figures()
    assert lazy["generated"] == pytest.approx(lazy["copied"])


def test_pixels_undo_a_view():
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*SIZE, 3), np.uint8))
    views = torch.stack([transforms.make("plain", *SIZE)(photo)] * 2)
    assert (transforms.pixels(views) == np.asarray(photo)).all()
    assert transforms.pixels(10 * torch.ones(1, 3, 4, 4)).max() == 255
