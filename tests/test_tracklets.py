"""Tracklets: their frames, the layouts they come in, views of them, extraction and training on them."""

import warnings

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image
from torch.nn.functional import normalize

from pyreid import evaluation, people, train
from pyreid.data import (
    Clip,
    Frames,
    ImageArrays,
    ImageError,
    Tracklets,
    batches,
    open_data,
    transforms,
)
from pyreid.methods.scl import Config
from pyreid.models import build_encoder


def arrays(count):
    """Images of one value each: that of their number."""
    pixels = np.empty((count, 8, 4, 3), np.uint8)
    pixels[:] = np.arange(count, dtype=np.uint8).reshape(-1, 1, 1, 1)
    return ImageArrays(pixels, ids=np.arange(count) // 10, cameras=np.arange(count) % 2)


def numbers(clip):
    return [np.asarray(frame)[0, 0, 0].item() for frame in clip]


def refused(call, *arguments, **options):
    with pytest.raises(ValueError) as error:
        call(*arguments, **options)
    return str(error.value)


def test_tracklets():
    tracklets = Tracklets(arrays(30), [range(3), range(10, 18), [25]])
    assert len(tracklets) == 3
    clip, known, camera = tracklets[1]
    assert isinstance(clip, Clip)
    assert (len(clip), known, camera) == (8, 1, 0)
    assert numbers(clip) == list(range(10, 18))
    assert numbers(clip[2:4]) == [12, 13]
    assert tracklets.names == ("000000", "000010", "000025")
    chosen = tracklets.select([2, 0])
    assert [numbers(clip) for clip, _, _ in chosen] == [[25], [0, 1, 2]]
    stills = chosen.stills()
    assert [numbers([image]) for image, _, _ in stills] == [[25], [1]]
    assert stills.ids.tolist() == [2, 0]
    named = Tracklets(arrays(4), [[0, 1], [2, 3]], ["a", "b"], np.array([7, 8]), np.array([1, 3]))
    assert (named.names, named.ids.tolist(), named[1][2]) == (("a", "b"), [7, 8], 3)
    assert refused(Tracklets, arrays(4), [[0], []]) == (
        "Tracklets: members must be one frame or more, got none at 1"
    )
    assert refused(Tracklets, arrays(4), [[0], [1]], ["a"], [0], [0]) == (
        "Tracklets: names must be one per tracklet, got 1 for 2"
    )


def values_of(view):
    """The numbers of the frames of a view."""
    plain = view[:, 0, 0, 0] * transforms.STD[0] + transforms.MEAN[0]
    return (255 * plain).round().long().tolist()


def test_frames():
    view = transforms.make("plain", 8, 4)
    clip = Tracklets(arrays(30), [range(20)])[0][0]
    four, seen = Frames(view, 4), set()
    for seed in range(60):
        torch.manual_seed(seed)
        chosen = values_of(four(clip))
        assert chosen == sorted(set(chosen))
        assert len(chosen) == 4
        seen |= set(chosen)
    assert seen == set(range(20))
    short = Tracklets(arrays(30), [[5, 9]])[0][0]
    repeated = values_of(four(short))
    assert repeated == sorted(repeated)
    assert len(repeated) == 4
    assert values_of(Frames(view, 4, exactly=False)(short)) == [5, 9]
    assert values_of(Frames(view, 20)(clip)) == list(range(20))


def test_batches_of_clips():
    tracklets = Tracklets(arrays(40), np.arange(40).reshape(8, 5))
    view = Frames(transforms.make("mirrored", 8, 4), 3)
    plan = [np.array([1, 6]), np.array([0, 7])]
    call = {"transforms": [view], "labels": np.arange(8), "seed": 5}
    found = list(batches(tracklets, plan, **call))
    assert found[0].views[0].shape == (2, 3, 3, 8, 4)
    for clip, row in zip(found[1].views[0], (0, 7), strict=True):
        chosen = values_of(clip)
        assert len(chosen) == 3
        assert set(chosen) <= set(range(5 * row, 5 * row + 5))
    (again,) = batches(tracklets, plan[1:], first_step=1, **call)
    assert torch.equal(again.views[0], found[1].views[0])


@pytest.mark.parametrize("stripes", [0, 2])
def test_extraction_takes_all_frames(stripes):
    torch.manual_seed(0)
    encoder = build_encoder("small", embedding=8, stripes=stripes, stripe_embedding=4)
    encoder(torch.randn(8, 3, 32, 16))
    rng = np.random.default_rng(0)
    frames = ImageArrays(rng.integers(0, 255, (9, 32, 16, 3), dtype=np.uint8))
    tracklets = Tracklets(frames, [[0, 1, 2, 3, 4], [5], [6, 7, 8]])
    size = {"height": 32, "width": 16}
    for flip in (False, True):
        found = evaluation.extract(encoder, tracklets, flip=flip, **size)
        views = torch.stack([transforms.make("plain", **size)(image) for image, _, _ in frames])
        with torch.no_grad():
            expected = [encoder.eval()(views[rows][None]) for rows in tracklets.members]
            if flip:
                mirrored = [encoder(views[rows].flip(3)[None]) for rows in tracklets.members]
                expected = [(a + b) / 2 for a, b in zip(expected, mirrored, strict=True)]
        torch.testing.assert_close(found, normalize(torch.cat(expected)))
    maps = encoder.backbone(views[:5]).mean((0, 2, 3))
    whole = encoder.neck(encoder.embedding(maps[None]))[0]
    alike = torch.cosine_similarity(whole, encoder(views[None, :5])[0, :8], dim=0)
    assert alike.item() == pytest.approx(1, abs=1e-5)  # averaged before the head


# --- layouts --------------------------------------------------------------------------------------


def put(path, shade):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 8), (shade, 0, 0)).save(path)


def put_mars(folder):
    """Two people to train on, two to test with, junk and a distractor."""
    (folder / "info").mkdir(parents=True)
    tracks = {
        "train": [("0001", 1, 2, 3), ("0001", 2, 1, 2), ("0003", 1, 1, 1)],
        "test": [
            *(("0002", 1, 1, 2), ("0002", 3, 1, 2), ("0004", 1, 1, 1)),
            *(("00-1", 2, 1, 2), ("0000", 2, 1, 2), ("0004", 5, 1, 3)),
        ],
    }
    for part, listed in tracks.items():
        lines, table = [], []
        for person, camera, number, count in listed:
            first = len(lines) + 1
            for frame in range(count):
                name = f"{person}C{camera}T{number:04}F{frame + 1:03}.jpg"
                put(folder / f"bbox_{part}" / person / name, 10 * len(lines))
                lines.append(name)
            known = -1 if person == "00-1" else int(person)
            table.append([first, len(lines), known, camera])
        (folder / f"info/{part}_name.txt").write_text("\n".join(lines) + "\n")
        scipy.io.savemat(
            folder / f"info/tracks_{part}_info.mat", {f"track_{part}_info": np.array(table)}
        )
    scipy.io.savemat(folder / "info/query_IDX.mat", {"query_IDX": np.array([[1, 6]])})


def quietly(path, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return open_data(path, **options)


def test_mars(tmp_path):
    put_mars(tmp_path / "data/MARS")
    with pytest.warns(UserWarning, match="mars: ") as warned:
        data = open_data(tmp_path / "data")
    assert str(warned[0].message).startswith(
        "mars: train should have 8,298 tracklets of 625 ids, found 3 of 2"
    )
    assert data.name == "mars"
    assert data.train.ids.tolist() == [1, 1, 3]
    assert data.train.cameras.tolist() == [0, 1, 0]  # cameras 1, 2, 3, 5 of all subsets
    assert [len(clip) for clip, _, _ in data.train] == [3, 2, 1]
    assert data.train.names[0] == "bbox_train/0001/0001C1T0002F001.jpg"
    assert (data.query.ids.tolist(), data.query.cameras.tolist()) == ([2, 4], [0, 3])
    assert data.gallery.ids.tolist() == [0, 2, 4]
    assert "tracklets" in data.summary()
    red = [np.asarray(frame)[0, 0, 0].item() for frame in data.train[1][0]]
    assert np.allclose(red, [30, 40], atol=4)  # JPEG
    (tmp_path / "data/MARS/bbox_train/0001/0001C2T0001F002.jpg").unlink()
    with pytest.raises(ImageError, match="no such image"):
        list(data.train[1][0])
    assert quietly(tmp_path / "data", layout="mars").name == "mars"


def test_half_unpacked_mars(tmp_path):
    put_mars(tmp_path)
    (tmp_path / "info/query_IDX.mat").unlink()
    assert refused(open_data, tmp_path).splitlines()[0] == (
        f"open_data: {tmp_path} is not whole (half unpacked?): looked for bbox_train, bbox_test and, in "
        "info, train_name.txt, test_name.txt, tracks_train_info.mat, tracks_test_info.mat, query_IDX.mat; "
        "found bbox_train, bbox_test, train_name.txt, test_name.txt, tracks_train_info.mat, "
        "tracks_test_info.mat"
    )


def test_mars_tables_that_say_nothing(tmp_path):
    put_mars(tmp_path)
    path = tmp_path / "info/tracks_train_info.mat"
    scipy.io.savemat(path, {"track_train_info": np.array([[1, 99, 1, 1]])})
    assert refused(open_data, tmp_path) == (
        f"open_data: {path}: row 1 must be of lines 1 to 6 of train_name.txt, got 1 to 99"
    )
    scipy.io.savemat(path, {"track_train_info": np.arange(3)})
    assert refused(open_data, tmp_path) == (f"open_data: {path}: must hold one matrix of 4 columns")


def test_duke_video(tmp_path):
    folder = tmp_path / "DukeMTMC-VideoReID"
    for subset, listed in {
        "train": [("0001", "0001", 2, 3), ("0005", "0002", 6, 1)],
        "query": [("0002", "0003", 1, 2)],
        "gallery": [("0002", "0004", 2, 2), ("0008", "0005", 6, 1)],
    }.items():
        for person, tracklet, camera, count in listed:
            for frame in range(count):
                name = f"{person}_C{camera}_F{frame:04}_X{100 + frame}.jpg"
                put(folder / subset / person / tracklet / name, 0)
    data = quietly(tmp_path)
    assert data.name == "dukemtmc-videoreid"
    assert data.train.names == ("train/0001/0001", "train/0005/0002")
    assert data.train.cameras.tolist() == [1, 2]  # cameras 1, 2, 6 of all subsets
    assert [len(clip) for clip, _, _ in data.train] == [3, 1]
    assert (data.query.ids.tolist(), data.query.cameras.tolist()) == ([2], [0])
    assert (data.gallery.ids.tolist(), data.gallery.cameras.tolist()) == ([2, 8], [1, 2])
    put(folder / "query/0002/0009/frame.jpg", 0)
    assert refused(open_data, tmp_path) == (
        f"open_data: {folder / 'query'}: paths must be such as 0001/0003/0001_C6_F0001_X1.jpg, "
        "got 0002/0009/frame.jpg"
    )


# --- made-up people, and training -----------------------------------------------------------------

SMALL = {"ids": 6, "cameras": 3, "images": 8, "height": 32, "width": 16, "quiet": True}


def test_people_as_tracklets():
    images = people.people_data(**SMALL)
    data = people.people_tracklets(**SMALL)
    assert 4 * len(data.train) == len(images.train)
    np.testing.assert_array_equal(data.train.images.pixels, images.train.pixels)
    for clip, known, camera in data.train:
        assert set(images.train.ids[clip.rows]) == {known}
        assert set(images.train.cameras[clip.rows]) == {camera}
    views = list(zip(data.query.ids.tolist(), data.query.cameras.tolist(), strict=True))
    assert len(set(views)) == len(views) == len(data.gallery)
    assert refused(people.people_tracklets, **SMALL | {"images": 6}) == (
        "people_tracklets: images must be a multiple of 4, and at least 8 to test with, got 6"
    )


def test_training_on_tracklets(tmp_path):
    torch.manual_seed(0)
    data = people.people_tracklets(**SMALL)
    encoder = build_encoder("small", embedding=32, stripes=2, stripe_embedding=16)
    training = train.Training(
        epochs=2,
        steps=3,
        batch_size=6,
        frames=2,
        warmup_epochs=0,
        height=32,
        width=16,
        device="cpu",
        channels_last=True,
    )
    config = Config(neighbours=2, initial_epochs=1)
    result = train.fit(config, encoder, data, training, output=tmp_path / "run")
    assert len(result.history) == 2
    assert np.isfinite(result.evaluation.mAP)
    assert list(result.evaluation.by_distance) == ["not squared", "not squared, cameras"]
    assert len(result.labels) == len(data.train)
