"""Body pictures: found in the released folders, kept in one file, joined to photos; and made."""

import dataclasses
import itertools
import json
import os
import pickle
import sys
import types

import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.spatial.transform import Rotation

from pyreid.commands import meshes as commands
from pyreid.data import (
    ANGLES,
    ImageArrays,
    MeshArrays,
    MeshedImages,
    MeshFolders,
    Photo,
    Tracklets,
    batches,
    open_data,
    open_folder,
    open_meshes,
    save_meshes,
)
from pyreid.data.transforms import MeshView, View, make
from pyreid.meshes import (
    COCO,
    lift,
    make_meshes,
    mesh_turns,
    neutral,
    people_meshes,
    raster,
    rasterise,
    read_bodies,
    read_keypoints,
    read_model,
    read_obj,
    turns,
    write_meshes,
)
from pyreid.meshes.figure import capsule_turns, picture
from pyreid.people import People, people_data, turned_photos, write_market
from pyreid.people.body import (
    JOINTS,
    Capsules,
    Proportions,
    body,
    rotations,
    skeleton,
    walking,
)

SHAPE = (16, 8)
MARKET = [
    "bounding_box_train/0002_c1s1_000451_03.jpg",
    "bounding_box_train/0007_c3s3_077419_03.jpg",
]
DUKE = ["bounding_box_train/0001_c2_f0046182.jpg", "bounding_box_train/0001_c5_f0051341.jpg"]
MSMT17 = [
    "train/0000/0000_000_01_0303morning_0008_0.jpg",
    "train/0001/0001_000_01_0303morning_0020_0.jpg",
]


def random_pixels(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 8, *SHAPE), dtype=np.uint8)


def photos(names, seed=1):
    pixels = np.random.default_rng(seed).integers(0, 256, (len(names), *SHAPE, 3), dtype=np.uint8)
    return ImageArrays(pixels, names, ids=np.arange(len(names)))


def write(folder, names, pixels):
    """As released: a folder for each angle."""
    for turn, angle in enumerate(ANGLES):
        below = folder / ("render" if turn == 0 else f"render_{angle}")
        for name, views in zip(names, pixels, strict=True):
            (below / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(views[turn]).save(below / name)


def raised(call, kind=ValueError):
    with pytest.raises(kind) as error:
        call()
    return str(error.value)


# --- Reading


@pytest.mark.parametrize(
    "where, names, inside",
    [
        ("market/train", MARKET, "{name}.png"),
        ("train", MARKET, "{name}.png"),
        ("", MARKET, "{name}.png"),
        ("DukeMTMC/train", DUKE, "{name}.png"),
        ("dukeMTMC/train", DUKE, "{name}.png"),
        ("msmt17/train", MSMT17, "{person}/{name}.png"),
        ("msmt17/train", MSMT17, "{name}.png"),
        ("", MARKET, "bounding_box_train/{name}.png"),
    ],
)
def test_released_folders(tmp_path, where, names, inside):
    images, pixels = photos(names), random_pixels(len(names))
    parts = [name[:-4].split("/") for name in names]
    written = [inside.format(person=part[-2], name=part[-1]) for part in parts]
    write(tmp_path / where, written, pixels)
    meshes = open_meshes(tmp_path, images)
    assert isinstance(meshes, MeshFolders)
    assert meshes.names == images.names
    for row in range(len(names)):
        for turn in range(8):
            np.testing.assert_array_equal(meshes.at(row, turn), pixels[row, turn])


def test_the_data_set_that_fits_is_chosen(tmp_path):
    pixels = random_pixels(4)
    for where, names, views in (("duke", DUKE, pixels[:2]), ("market", MARKET, pixels[2:])):
        write(tmp_path / where / "train", [name[19:-4] + ".png" for name in names], views)
    assert open_meshes(tmp_path, photos(DUKE)).folder.parts[-2:] == ("duke", "train")
    meshes = open_meshes(tmp_path, photos(MARKET))
    np.testing.assert_array_equal(meshes.at(1, 5), pixels[3, 5])


def test_test_images_are_in_test(tmp_path):
    write(tmp_path / "test", ["a.png"], random_pixels(1, seed=1))
    write(tmp_path / "train", ["a.png"], random_pixels(1, seed=2))
    for subset, seed in (("train", 2), ("query", 1), ("gallery", 1), ("test", 1)):
        meshes = open_meshes(tmp_path, photos(["query/a.jpg"]), subset=subset)
        np.testing.assert_array_equal(meshes.at(0, 3), random_pixels(1, seed=seed)[0, 3])


def test_what_is_missing_is_counted_and_named(tmp_path):
    names = [name[19:-4] + ".png" for name in MARKET]
    write(tmp_path, names, random_pixels(2))
    (tmp_path / "render_90" / names[1]).unlink()
    for name in names:
        (tmp_path / "render_315" / name).unlink()
    message = raised(lambda: open_meshes(tmp_path, photos(MARKET)))
    assert f"render_90: 1 of 2, the first {MARKET[1]}" in message
    assert f"render_315: 2 of 2, the first {MARKET[0]}" in message
    assert "render_45" not in message


def test_one_picture_is_not_two_photos(tmp_path):
    write(tmp_path, ["0001.png"], random_pixels(1))
    message = raised(lambda: open_meshes(tmp_path, photos(["cam1/0001.jpg", "cam2/0001.jpg"])))
    assert "got one for 2" in message
    assert "cam1/0001.jpg" in message
    write(tmp_path, ["cam1/0001.png", "cam2/0001.png"], pixels := random_pixels(2))
    meshes = open_meshes(tmp_path, photos(["x/cam2/0001.jpg", "x/cam1/0001.jpg"]))
    np.testing.assert_array_equal(meshes.at(0, 0), pixels[1, 0])


def test_extensions_and_numbers_of_frames(tmp_path):
    pixels = random_pixels(4)
    names = ["a.png", "a.jpg", "b.001", "b.002"]
    arrays = MeshArrays(pixels, names)
    for row, name in enumerate(names):
        np.testing.assert_array_equal(arrays.of([f"set/{name}"]).at(0, 0), pixels[row, 0])
    np.testing.assert_array_equal(arrays.of(["b.002.jpg"]).at(0, 0), pixels[3, 0])
    assert "the first b.003" in raised(lambda: arrays.of(["b.003"]))
    images = photos(names)
    write_meshes(tmp_path, images, height=16, width=8, quiet=True)
    assert sorted(path.name for path in (tmp_path / "render").iterdir()) == [
        *("a.jpg", "a.png", "b.001.png", "b.002.png")
    ]
    drawn = make_meshes(images, height=16, width=8, quiet=True)
    meshes = open_meshes(tmp_path, images)
    for row in (0, 2, 3):
        np.testing.assert_array_equal(meshes.at(row, 1), drawn.at(row, 1))


def test_bad_paths(tmp_path):
    images = photos(MARKET)
    assert "does not exist" in raised(lambda: open_meshes(tmp_path / "no", images))
    (tmp_path / "photos").mkdir()
    assert "found photos" in raised(lambda: open_meshes(tmp_path, images))
    assert "'val'" in raised(lambda: open_meshes(tmp_path, images, subset="val"))
    (tmp_path / "x.npz").write_bytes(b"PK\x03\x04 no such thing")
    assert "x.npz: is corrupt" in raised(lambda: open_meshes(tmp_path / "x.npz", images))
    np.savez(tmp_path / "y.npz", features=np.zeros(3))
    assert "it holds features" in raised(lambda: open_meshes(tmp_path / "y.npz", images))


def test_a_damaged_picture_is_named(tmp_path):
    write(tmp_path, ["a.png"], random_pixels(1))
    meshes = open_meshes(tmp_path, photos(["a.jpg"]))
    (tmp_path / "render_45" / "a.png").write_bytes(b"nothing")
    message = raised(lambda: meshes.at(0, 1))
    assert "render_45/a.png: cannot be read" in message
    (tmp_path / "render_45" / "a.png").unlink()
    assert "no such body picture" in raised(lambda: meshes.at(0, 1))


# --- One file


@given(count=st.integers(0, 4), seed=st.integers(0, 99))
def test_one_file_there_and_back(tmp_path_factory, count, seed):
    path = tmp_path_factory.mktemp("cache") / "meshes.npz"
    names = [f"a/{row}.jpg" for row in range(count)]
    pixels = random_pixels(count, seed)
    save_meshes(path, names, iter(pixels))
    order = np.random.default_rng(seed).permutation(count)
    meshes = open_meshes(path, photos(names).select(order))
    assert meshes.names == tuple(names[row] for row in order)
    for row, place in enumerate(order):
        for turn in range(8):
            np.testing.assert_array_equal(meshes.at(row, turn), pixels[place, turn])


def test_a_folder_may_hold_a_file_for_each_subset(tmp_path):
    for seed, below in enumerate(("train", "test")):
        save_meshes(tmp_path / f"{below}.npz", ["a.jpg"], random_pixels(1, seed))
    for subset, seed in (("train", 0), ("gallery", 1)):
        meshes = open_meshes(tmp_path, photos(["x/a.png"]), subset=subset)
        np.testing.assert_array_equal(meshes.at(0, 6), random_pixels(1, seed)[0, 6])


def test_one_file_is_small_and_travels_by_its_name(tmp_path):
    body = np.full((1, 8, 256, 128), 255, np.uint8)
    body[:, :, 20:240, 40:90] = np.linspace(60, 220, 50, dtype=np.uint8)
    names = [f"{row}.jpg" for row in range(20)]
    save_meshes(tmp_path / "m.npz", names, (body[0] for _ in names))
    assert (tmp_path / "m.npz").stat().st_size < 20 * body.size / 25
    meshes = open_meshes(tmp_path / "m.npz", photos(names))
    sent = pickle.dumps(meshes)
    assert len(sent) < 1000
    np.testing.assert_array_equal(pickle.loads(sent).at(7, 2), body[0, 2])


def test_save_meshes_refuses(tmp_path):
    pixels = random_pixels(2)
    assert "end in .npz" in raised(lambda: save_meshes(tmp_path / "m.npy", ["a"], pixels[:1]))
    assert "no folder" in raised(lambda: save_meshes(tmp_path / "x/m.npz", ["a"], pixels[:1]))
    assert "one per name, got 2 for 1" in raised(
        lambda: save_meshes(tmp_path / "m.npz", ["a"], pixels)
    )
    assert "(7, 16, 8)" in raised(lambda: save_meshes(tmp_path / "m.npz", ["a"], [pixels[0, :7]]))
    assert list(tmp_path.iterdir()) == []


# --- Beside photos


def meshed(count=6):
    names = [f"{row}.jpg" for row in range(count)]
    return MeshedImages(photos(names), MeshArrays(random_pixels(count), names))


def test_meshed_images_are_photos_and_bodies():
    images = meshed()
    plain = images.photos
    chosen = images.select([4, 1])
    for row, place in enumerate((4, 1)):
        image, person, _ = chosen[row]
        assert person == place
        np.testing.assert_array_equal(np.asarray(image.photo), np.asarray(plain[place][0]))
        np.testing.assert_array_equal(np.asarray(image.turned(3)), images.meshes.pixels[place, 3])
    assert chosen.photos.names == chosen.names == ("4.jpg", "1.jpg")
    np.testing.assert_array_equal(np.asarray(chosen.stills()[0][0]), np.asarray(plain[4][0]))


def test_meshed_images_match_by_name():
    pixels = random_pixels(3)
    arrays = MeshArrays(pixels, ["c.png", "a.png", "b.png"])
    images = MeshedImages(photos(["set/a.jpg", "set/b.jpg"]), arrays)
    np.testing.assert_array_equal(np.asarray(images[1][0].turned(0)), pixels[2, 0])
    message = raised(lambda: MeshedImages(photos(["a.jpg", "d.jpg"]), arrays))
    assert "1 of 2 are missing, the first d.jpg" in message
    assert "got tracklets" in raised(
        lambda: MeshedImages(Tracklets(photos(["a.jpg"]), [[0]]), arrays)
    )
    assert "got uint8 (3, 7, 16, 8)" in raised(lambda: MeshArrays(pixels[:, :7], "abc"))
    assert "got 2 for 3" in raised(lambda: MeshArrays(pixels, "ab"))


def test_background_is_exactly_one():
    blank = MeshArrays(np.full((1, 8, *SHAPE), 255, np.uint8), ["a"])
    blank.pixels[0, 0, 5:9, 3:5] = 0
    (image, _, _) = MeshedImages(photos(["a"]), blank)[0]
    for size in (SHAPE, (256, 128), (31, 17), (9, 5)):
        turned = MeshView(*size, (3,))(image)
        assert turned.shape == (1, *size)
        assert turned.dtype == torch.float32
        assert (turned == 1).all()
        straight = MeshView(*size, (0,))(image)
        assert straight.max() == 1
        assert straight.min() < -0.5
        assert (straight[:, :2] == 1).all()


def test_views_by_name():
    assert make("mesh", 4, 2) == MeshView(4, 2, (0,))
    assert make("turned mesh", 4, 2) == MeshView(4, 2, (1, 2, 3, 4, 5, 6, 7))
    assert make("turned mesh to 270", 4, 2) == MeshView(4, 2, (1, 2, 3, 4, 5, 6))
    assert "turned mesh" in raised(lambda: make("turnt mesh", 4, 2))
    for some in ((), (8,), (-1, 2)):
        assert "some of 0 to 7" in raised(lambda some=some: MeshView(4, 2, some))


def test_every_turn_is_drawn_by_torchs_generator():
    turns = np.arange(8, dtype=np.uint8)[None, :, None, None] * np.ones((1, 1, *SHAPE), np.uint8)
    (image, _, _) = MeshedImages(photos(["a"]), MeshArrays(turns, ["a"]))[0]
    view = make("turned mesh to 270", *SHAPE)
    torch.manual_seed(0)
    drawn = [round(float((view(image)[0, 0, 0] + 1) * 127.5)) for _ in range(200)]
    assert set(drawn) == {1, 2, 3, 4, 5, 6}
    torch.manual_seed(0)
    assert drawn == [round(float((view(image)[0, 0, 0] + 1) * 127.5)) for _ in range(200)]


@pytest.mark.parametrize("kind", ["arrays", "file", "folders"])
def test_batches_of_meshed_images(tmp_path, kind):
    names = [f"{row}.png" for row in range(6)]
    pixels = random_pixels(6)
    meshes = MeshArrays(pixels, names)
    if kind == "file":
        save_meshes(tmp_path / "m.npz", names, pixels)
        meshes = open_meshes(tmp_path / "m.npz", photos(names))
    if kind == "folders":
        write(tmp_path, names, pixels)
        meshes = open_meshes(tmp_path, photos(names))
    images = MeshedImages(photos(names), meshes).select([5, 3, 1, 0])
    transforms = [Photo(View(*SHAPE, flip=0.5)), make("mesh", *SHAPE), make("turned mesh", *SHAPE)]

    def drawn(workers):
        plan = [[0, 1], [2, 3], [3, 0]]
        return list(
            batches(
                images,
                plan,
                transforms=transforms,
                labels=np.arange(4),
                seed=3,
                workers=workers,
            )
        )

    ours, theirs = drawn(0), drawn(2)
    assert [tuple(view.shape) for view in ours[0].views] == [
        (2, 3, *SHAPE),
        (2, 1, *SHAPE),
        (2, 1, *SHAPE),
    ]
    for one, other in zip(ours, theirs, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(one.views, other.views, strict=True))
    expected = torch.from_numpy(pixels[[1, 0], 0].astype(np.float32) / np.float32(127.5) - 1)
    assert torch.equal(ours[1].views[1][:, 0], expected)


# --- Bodies


def silhouettes(views):
    return views < 255


def somebody(phase=0.7, stride=0.6):
    return walking(phase, stride)


@given(st.floats(0, 2 * np.pi), st.floats(-np.pi, np.pi))
def test_from_the_other_side_the_silhouette_is_mirrored(phase, yaw):
    seen = silhouettes(turns(somebody(phase), height=64, width=48, yaw=yaw))
    for turn in range(4):
        differ = seen[turn] != seen[turn + 4][:, ::-1]
        assert differ.mean() < 0.01


def test_turns_are_yaws():
    straight = turns(somebody(), height=64, width=48)
    turned = turns(somebody(), height=64, width=48, yaw=np.pi / 2)
    for turn in range(6):
        np.testing.assert_array_equal(turned[turn], straight[turn + 2])


@pytest.mark.parametrize("side, sign", [("left", 1), ("right", -1)])
def test_a_raised_arm_is_where_it_should_be(side, sign):
    pose = walking(0, stride=0)
    raised_arm = pose.copy()
    raised_arm[JOINTS[f"{side} shoulder"], 2] = sign * 1.5  # sideways, level
    size = {"height": 96, "width": 96}
    extra = silhouettes(turns(raised_arm, **size)) & ~silhouettes(turns(pose, **size))
    on_the_right = extra[:, :, 48:].sum(axis=(1, 2)).astype(int)
    beside = sign * (2 * on_the_right - extra.sum(axis=(1, 2)))
    # Facing the viewer, the left arm is on the right of the picture; from behind, on the left.
    for turn in (7, 0, 1):
        assert beside[turn] > 50
        assert beside[(turn + 4) % 8] < -50
    assert extra[0].sum() > 2.5 * max(extra[2].sum(), extra[6].sum())


def test_the_nose_goes_to_the_right_as_somebody_turns_left():
    views = silhouettes(turns(walking(0, stride=0), height=256, width=128))
    rows = slice(22, 34)  # of the face
    for turn, view in ((2, views[2]), (6, views[6])):
        columns = np.flatnonzero(view[rows].any(axis=0))
        middle = np.flatnonzero(view[12:20].any(axis=0)).mean()  # of the skull
        ahead = (columns[-1] - middle) - (middle - columns[0])
        assert ahead * (1 if turn == 2 else -1) > 2


def test_bodies_are_shaded_grey_on_white():
    views = turns(somebody(), height=128, width=64)
    assert views.shape == (8, 128, 64)
    assert views.dtype == np.uint8
    for view in views:
        rows, columns = (np.flatnonzero((view < 255).any(axis=axis)) for axis in (1, 0))
        assert 0.88 < (rows[-1] - rows[0] + 1) / 128 < 0.96  # from head to foot
        assert columns[0] > 0
        assert columns[-1] < 63
        inner = view[view < 220]
        assert len(np.unique(inner)) > 60
        assert inner.min() < 110
        assert 140 < np.median(inner) < 215


def test_unknown_people_walk_each_in_their_own_way():
    first, second = neutral("0001.jpg"), neutral("0002.jpg")
    np.testing.assert_array_equal(first, neutral("0001.jpg"))
    assert np.abs(first - second).max() > 0.05


def test_an_aspect_is_the_photos():
    size = {"height": 64, "width": 64}
    narrow = turns(somebody(), **size, aspect=0.5)
    plain = turns(somebody(), height=64, width=32)
    halved = narrow.reshape(8, 64, 32, 2).mean(axis=3)
    assert np.abs(halved - plain).mean() < 4


# --- Keypoints


_FACE = {
    "nose": (0, 0.055, 0.06),
    "left eye": (0.02, 0.07, 0.05),
    "right eye": (-0.02, 0.07, 0.05),
    "left ear": (0.045, 0.065, 0),
    "right ear": (-0.045, 0.065, 0),
}


def seen_keypoints(pose, yaw, size, proportions=None):
    """(17, 3): where a camera sees the joints of a body."""
    joints = skeleton(proportions or Proportions(), pose)
    turn = rotations(np.array([0, yaw, 0.0]))
    points = (joints.positions - joints.positions[0]) @ turn.T
    head = joints.unit * turn @ joints.rotations[JOINTS["head"]]
    found = [
        points[JOINTS[name]] if name in JOINTS else points[JOINTS["head"]] + head @ _FACE[name]
        for name in COCO
    ]
    scale = 0.9 * size[1] / joints.unit
    return np.array([(size[0] / 2 + scale * x, size[1] / 2 - scale * y, 1) for x, y, _ in found])


def in_the_photo(lifted, size):
    """(17, 2), nan where the body has no such joint."""
    left, below, right, above = lifted.window
    at = np.array(
        [lifted.skeleton.positions[JOINTS[n]] if n in JOINTS else [np.nan] * 3 for n in COCO]
    )
    return np.stack(
        [
            (at[:, 0] - left) / (right - left) * size[0],
            (above - at[:, 1]) / (above - below) * size[1],
        ],
        axis=1,
    )


@given(
    phase=st.floats(0, 2 * np.pi),
    stride=st.floats(0.2, 1),
    yaw=st.floats(-np.pi, np.pi),
    seed=st.integers(0, 20),
)
def test_lifting_finds_the_joints_and_the_yaw_again(phase, stride, yaw, seed):
    size = (64, 128)
    proportions = Proportions.draw(np.random.default_rng(seed)) if seed else Proportions()
    keypoints = seen_keypoints(walking(phase, stride), yaw, size, proportions)
    lifted = lift(keypoints, size)
    off = np.linalg.norm(in_the_photo(lifted, size) - keypoints[:, :2], axis=1)[5:] / 128
    assert off.mean() < 0.012
    assert off.max() < 0.04
    apart = (lifted.yaw - yaw + np.pi) % (2 * np.pi) - np.pi
    assert np.degrees(abs(apart)) < 35


def test_lifting_keeps_bones_and_frames():
    lifted = lift(seen_keypoints(somebody(), 1.0, (64, 128)), (64, 128))
    rest = skeleton(Proportions(stature=1), np.zeros((15, 3))).positions
    at = lifted.skeleton.positions
    for upper, lower in (
        ("hip", "knee"),
        ("knee", "ankle"),
        ("shoulder", "elbow"),
        ("elbow", "wrist"),
    ):
        for side in ("left", "right"):
            one, two = JOINTS[f"{side} {upper}"], JOINTS[f"{side} {lower}"]
            np.testing.assert_allclose(
                np.linalg.norm(at[one] - at[two]), np.linalg.norm(rest[one] - rest[two])
            )
    turned = lifted.skeleton.rotations
    np.testing.assert_allclose(
        turned @ turned.transpose(0, 2, 1), np.eye(3) + 0 * turned, atol=1e-9
    )
    np.testing.assert_allclose(np.linalg.det(turned), 1)


def test_turned_bodies_of_keypoints_are_the_true_ones():
    """What the photo does not show: the body from the other sides."""
    size, overlaps = (64, 128), []
    for phase, yaw in itertools.product((0.4, 1.6, 2.8, 4.5), (0.3, 1.4, 2.6, -2.0)):
        pose = walking(phase, 0.6)
        keypoints = seen_keypoints(pose, yaw, size)
        images = ImageArrays(np.zeros((1, 128, 64, 3), np.uint8), ["a.jpg"])
        drawn = make_meshes(
            images, height=128, width=64, keypoints={"a.png": keypoints}, quiet=True
        )
        joints = skeleton(Proportions(), pose)
        capsules = joints.attach(body(Proportions())).moved(-joints.positions[0])
        half = 1.72 / 0.9 / 2
        window = (-half / 2, -half, half / 2, half)
        true = capsule_turns(capsules, height=128, width=64, window=window, yaw=yaw)
        for ours, theirs in zip(silhouettes(drawn.pixels[0]), silhouettes(true), strict=True):
            overlaps.append((ours & theirs).sum() / (ours | theirs).sum())
    assert np.mean(overlaps) > 0.9
    assert np.min(overlaps) > 0.6


def test_what_is_not_seen_is_a_walkers():
    size = (64, 128)
    keypoints = seen_keypoints(somebody(), 0.5, size)
    whole = lift(keypoints, size)
    no_arm = keypoints.copy()
    no_arm[[COCO.index("left elbow"), COCO.index("left wrist")]] = 0, 0, 0.05
    partial = lift(no_arm, size)
    at = {
        name: JOINTS[name] for name in ("left shoulder", "left wrist", "right wrist", "left ankle")
    }
    for name in ("right wrist", "left ankle"):
        np.testing.assert_allclose(
            partial.skeleton.positions[at[name]], whole.skeleton.positions[at[name]], atol=0.15
        )
    hanging = partial.skeleton.positions[at["left wrist"]]
    shoulder = partial.skeleton.positions[at["left shoulder"]]
    assert shoulder[1] - hanging[1] > 0.3
    for missing in ("hip", "shoulder"):
        some = keypoints.copy()
        some[[COCO.index(f"{side} {missing}") for side in ("left", "right")], 2] = 0
        assert np.isfinite(lift(some, size).skeleton.positions).all()
    nobody = keypoints * (1, 1, 0)
    assert lift(nobody, size) is None
    assert lift(np.full((17, 3), np.nan), size) is None
    assert "(17, 3), got (17, 2)" in raised(lambda: lift(keypoints[:, :2], size))


def test_keypoint_files(tmp_path):
    points = np.random.default_rng(0).random((2, 17, 3)).round(3)
    names = ["a.jpg", "b.jpg"]
    flat = [one.ravel().tolist() for one in points]
    files = {
        "plain.json": dict(zip(names, points.tolist(), strict=True)),
        "results.json": [
            {"file_name": name, "keypoints": one} for name, one in zip(names, flat, strict=True)
        ],
        "coco.json": {
            "images": [{"id": 7, "file_name": "a.jpg"}, {"id": 3, "file_name": "b.jpg"}],
            "annotations": [
                {"image_id": 3, "keypoints": flat[1]},
                {"image_id": 7, "keypoints": [0.0] * 51},  # somebody else, in the background
                {"image_id": 7, "keypoints": flat[0]},
            ],
        },
    }
    for name, held in files.items():
        (tmp_path / name).write_text(json.dumps(held))
    np.savez(tmp_path / "arrays.npz", names=names, keypoints=points)
    for name in (*files, "arrays.npz"):
        found = read_keypoints(tmp_path / name)
        assert sorted(found) == names
        for row, photo in enumerate(names):
            np.testing.assert_allclose(found[photo], points[row])
    np.savez(tmp_path / "flat.npz", names=names, keypoints=points[..., :2])
    assert (read_keypoints(tmp_path / "flat.npz")["a.jpg"][:, 2] == 1).all()
    assert "no such file" in raised(lambda: read_keypoints(tmp_path / "none.json"))
    for text in ('{"a.jpg": [1, 2, 3]}', "[{}]", "[1]", "nothing", '[{"file_name": "a.jpg"}]'):
        (tmp_path / "bad.json").write_text(text)
        assert "must hold 17 keypoints" in raised(lambda: read_keypoints(tmp_path / "bad.json"))


# --- Triangles


def brute_force(points, nearness, faces, height, width):
    """(H, W) faces, -1 for none: one pixel and one triangle after the other."""
    seen = np.full((height, width), -1)
    best = np.full((height, width), -np.inf)
    for y, x in itertools.product(range(height), range(width)):
        for number, face in enumerate(faces):
            corners = np.concatenate([points[face].T, np.ones((1, 3))])
            if abs(np.linalg.det(corners)) < 1e-9:
                continue
            weights = np.linalg.solve(corners, (x + 0.5, y + 0.5, 1))
            near = weights @ nearness[face]
            if (weights >= 0).all() and near > best[y, x]:
                seen[y, x], best[y, x] = number, near
    return seen, best


@given(seed=st.integers(0, 10_000), many=st.integers(0, 9))
def test_rasterise_is_brute_force(seed, many):
    rng = np.random.default_rng(seed)
    points, nearness = rng.uniform(-4, 14, (12, 2)), rng.uniform(-1, 1, 12)
    faces = np.array([rng.permutation(12)[:3] for _ in range(many)], np.int64).reshape(-1, 3)
    hits = rasterise(points, nearness, faces, 10, 9)
    seen, best = brute_force(points, nearness, faces, 10, 9)
    np.testing.assert_array_equal(hits.face, seen)
    inside = seen >= 0
    np.testing.assert_allclose(hits.nearness[inside], best[inside], atol=1e-5)
    found = np.einsum("pk,pkx->px", hits.weights[inside], points[faces[seen[inside]]])
    rows, columns = np.nonzero(inside)
    np.testing.assert_allclose(found, np.stack([columns, rows], 1) + 0.5, atol=1e-4)


def test_rasterise_in_parts_is_the_same(monkeypatch):
    rng = np.random.default_rng(0)
    points, nearness = rng.uniform(0, 32, (40, 2)), rng.uniform(-1, 1, 40)
    faces = rng.integers(0, 40, (60, 3))
    whole = rasterise(points, nearness, faces, 32, 32)
    monkeypatch.setattr(raster, "_AT_ONCE", 100)
    for one, other in zip(whole, rasterise(points, nearness, faces, 32, 32), strict=True):
        np.testing.assert_array_equal(one, other)


def sphere(rows=20, columns=40, radius=1.0):
    """A closed mesh, counter-clockwise from outside."""
    down = np.linspace(0, np.pi, rows + 1)[:, None]
    around = np.linspace(0, 2 * np.pi, columns, endpoint=False)
    shell = np.stack(
        [
            np.sin(down) * np.sin(around),
            np.cos(down) + 0 * around,
            np.sin(down) * np.cos(around),
        ],
        axis=-1,
    )
    i, j = np.mgrid[:rows, :columns]
    here, right = i * columns + j, i * columns + (j + 1) % columns
    faces = np.stack([here, here + columns, right, right, here + columns, right + columns], -1)
    return radius * shell.reshape(-1, 3), faces.reshape(-1, 3)


def test_a_sphere_is_lit_as_capsules_are():
    vertices, faces = sphere(60, 120)
    mesh = mesh_turns(vertices, faces, height=64, width=64)
    ball = Capsules(
        start=np.zeros((1, 3)),
        end=np.array([[0, 1e-6, 0]]),
        radii=np.ones((1, 2)),
        part=np.zeros(1, np.int64),
        origin=np.zeros((1, 3)),
        axes=np.eye(3)[None],
        unit=1e-6,
    )
    half = 1 / 0.92
    exact = picture(ball, 64, 64, window=(-half, -half, half, half))
    for view in mesh:
        assert np.abs(view.astype(int) - exact).max() <= 12
        assert np.abs(view.astype(int) - exact).mean() < 0.5


def test_what_faces_the_viewer_turns_to_the_right():
    vertices, faces = sphere()
    vertices[vertices[:, 2] > 0.9, 2] *= 1.6  # a nose
    views = silhouettes(mesh_turns(vertices, faces, height=64, width=96))
    offsets = [np.flatnonzero(view[32]).mean() - np.flatnonzero(view[12]).mean() for view in views]
    assert offsets[2] > 1
    assert offsets[6] < -1
    assert abs(offsets[0]) < 0.2
    assert abs(offsets[4]) < 0.2


def test_obj_files(tmp_path):
    path = tmp_path / "body.obj"
    path.write_text(
        "# a square and a triangle\nv 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 0\nvn 0 0 1\n"
        "f 1//1 2//1 3//1 4//1\nf -4/1 -3/2 -2/3\n"
    )
    vertices, faces = read_obj(path)
    assert vertices.shape == (4, 3)
    assert faces.tolist() == [[0, 1, 2], [0, 2, 3], [0, 1, 2]]
    for text in ("v 0 0 x\n", "v 0 0 0\n", "v 0 0 0\nf 1 2 3\n"):
        path.write_text(text)
        assert "body.obj" in raised(lambda: read_obj(path))


# --- SMPL


def made_up_model(seed=0):
    """A sphere of 3 joints in a row, in SMPL's keys."""
    rng = np.random.default_rng(seed)
    vertices, faces = sphere(6, 8)
    count = len(vertices)
    weights = rng.random((count, 3))
    regressor = rng.random((3, count))
    return {
        "v_template": vertices,
        "shapedirs": 0.1 * rng.normal(size=(count, 3, 4)),
        "posedirs": 0.05 * rng.normal(size=(count, 3, 18)),
        "J_regressor": regressor / regressor.sum(axis=1, keepdims=True),
        "kintree_table": np.array([[2**32 - 1, 0, 1], [0, 1, 2]], np.uint32),
        "weights": weights / weights.sum(axis=1, keepdims=True),
        "f": faces.astype(np.uint32),
    }


def skinned(model, pose, shape):
    """The model's own formulas, a vertex and a joint at a time."""
    turns = [Rotation.from_rotvec(vector).as_matrix() for vector in pose.reshape(-1, 3)]
    rest = model["v_template"].copy()
    for k, amount in enumerate(shape):
        rest += amount * model["shapedirs"][..., k]
    joints = model["J_regressor"] @ rest
    bent = rest.copy()
    extra = np.concatenate([(turn - np.eye(3)).ravel() for turn in turns[1:]])
    for k, amount in enumerate(extra):
        bent += amount * model["posedirs"][..., k]
    result = np.zeros_like(rest)
    for vertex, weights in enumerate(model["weights"]):
        for joint, weight in enumerate(weights):
            point, at = bent[vertex], joint
            while at >= 0:  # turned about the joint, then about those above it
                point = turns[at] @ (point - joints[at]) + joints[at]
                at -= 1
            result[vertex] += weight * point
    return result


@given(seed=st.integers(0, 1000))
def test_skinning_is_a_plain_loop(tmp_path_factory, seed):
    rng = np.random.default_rng(seed)
    model = made_up_model(seed)
    path = tmp_path_factory.mktemp("smpl") / "model.npz"
    np.savez(path, **model)
    pose, shape = rng.normal(size=9), rng.normal(size=3)
    body_model = read_model(path)
    expected = skinned(model, pose, shape)
    np.testing.assert_allclose(body_model.vertices(pose, shape), expected, atol=1e-9)
    turns = Rotation.from_rotvec(pose.reshape(3, 3)).as_matrix()
    np.testing.assert_allclose(body_model.vertices(turns, shape), expected, atol=1e-9)
    still = np.zeros(9)
    np.testing.assert_allclose(
        body_model.vertices(still, shape[:0]), model["v_template"], atol=1e-12
    )


def test_models_as_their_authors_pickle_them(tmp_path, monkeypatch):
    """Python 2's protocol, a sparse regressor, chumpy's arrays."""
    model = made_up_model()
    np.savez(tmp_path / "model.npz", **model)
    chumpy = types.ModuleType("chumpy.ch")
    chumpy.Ch = type("Ch", (), {"__module__": "chumpy.ch", "__qualname__": "Ch"})
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "chumpy", types.ModuleType("chumpy"))
        patched.setitem(sys.modules, "chumpy.ch", chumpy)
        shapes = chumpy.Ch()
        shapes.x = model["shapedirs"]
        for kind in (scipy.sparse.csc_matrix, scipy.sparse.csr_matrix):
            for protocol in (0, 2, 4):
                pickled = model | {"shapedirs": shapes, "J_regressor": kind(model["J_regressor"])}
                path = tmp_path / f"{kind.__name__}{protocol}.pkl"
                path.write_bytes(pickle.dumps(pickled, protocol))
    expected = read_model(tmp_path / "model.npz")
    pose, shape = np.linspace(-1, 1, 9), np.ones(4)
    paths = list(tmp_path.glob("*.pkl"))
    assert len(paths) == 6
    for path in paths:
        np.testing.assert_allclose(
            read_model(path).vertices(pose, shape), expected.vertices(pose, shape)
        )


class Harm:
    def __reduce__(self):
        return os.mkdir, ("harmed",)


def test_pickles_run_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for harm in (Harm(), {"v_template": Harm()}, [np.zeros(1), Harm()]):
        (tmp_path / "model.pkl").write_bytes(pickle.dumps(harm))
        message = raised(lambda: read_model(tmp_path / "model.pkl"))
        assert "mkdir, which is not read" in message
    assert not (tmp_path / "harmed").exists()
    np.savez(tmp_path / "model.npz", v_template=np.array([Harm()], object))
    assert "is corrupt or no" in raised(lambda: read_model(tmp_path / "model.npz"))
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"f": None}, "it has no f"),
        ({"v_template": np.zeros((5, 3))}, "v_template must have shape"),
        ({"posedirs": np.zeros((56, 3, 9))}, "posedirs must have shape"),
        ({"kintree_table": np.array([[0, 2, 1], [0, 1, 2]])}, "a parent before it"),
    ],
)
def test_bad_models(tmp_path, changes, message):
    model = {key: value for key, value in (made_up_model() | changes).items() if value is not None}
    np.savez(tmp_path / "model.npz", **model)
    assert message in raised(lambda: read_model(tmp_path / "model.npz"))


def poses(path, names, cameras, **changes):
    count = len(names)
    arrays = {
        "names": names,
        "poses": np.zeros((count, 9)),
        "betas": np.zeros((count, 4)),
        "cam": np.array(cameras, float),
    }
    np.savez(path, **{key: value for key, value in (arrays | changes).items() if value is not None})
    return path


def test_hmrs_camera(tmp_path):
    """A sphere of radius 1 is 224 s / 2 pixels of HMR's wide; tx and ty move it by as much to the right and
    down."""
    np.savez(tmp_path / "model.npz", **made_up_model())
    file = poses(tmp_path / "poses.npz", ["a.jpg", "b.jpg"], [(0.3, 0.4, -0.2), (0.2, 0, 0)])
    bodies = read_bodies(tmp_path / "model.npz", file)
    for row, (s, x, y) in enumerate([(0.3, 0.4, -0.2), (0.2, 0, 0)]):
        views = bodies.turns(row, size=(112, 224), height=224, width=112)
        rows, columns = np.nonzero(silhouettes(views[0]))
        assert abs(columns.mean() + 0.5 - (56 + 112 * s * x)) < 1
        assert abs(rows.mean() + 0.5 - (112 + 112 * s * y)) < 1
        assert abs(np.ptp(rows) + 1 - 224 * s) < 0.04 * 224 * s + 2
        small = bodies.turns(
            row, size=(50, 100), height=224, width=112
        )  # the same, of a smaller photo
        np.testing.assert_array_equal(small, views)


def test_regressed_bodies_turn_as_others_do(tmp_path):
    model = made_up_model()
    nose = model["v_template"][:, 2] < -0.6  # towards the viewer: z goes away
    model["v_template"] = np.where(
        nose[:, None], model["v_template"] * (1, 1, 2), model["v_template"]
    )
    np.savez(tmp_path / "model.npz", **model)
    bodies = read_bodies(tmp_path / "model.npz", poses(tmp_path / "p.npz", ["a"], [(0.4, 0, 0)]))
    views = silhouettes(bodies.turns(0, size=(96, 96), height=96, width=96))
    left, right = ([int(op(np.nonzero(view)[1])) for view in views] for op in (np.min, np.max))
    assert right[2] - right[0] > 5
    assert left[0] - left[6] > 5


def test_bad_poses(tmp_path):
    np.savez(tmp_path / "model.npz", **made_up_model())

    def message(**changes):
        file = poses(tmp_path / "p.npz", ["a", "b"], [(0.4, 0, 0)] * 2, **changes)
        return raised(lambda: read_bodies(tmp_path / "model.npz", file))

    assert "must hold camera, got names, poses, betas" in message(cam=None)
    assert "pose must have shape (2, 9) or (2, 3, 3, 3), got (2, 8)" in message(
        poses=np.zeros((2, 8))
    )
    assert "shape must have shape (2, 4) or less, got (2, 5)" in message(betas=np.zeros((2, 5)))
    assert "a positive scale" in message(cam=np.zeros((2, 3)))


# --- Whole data sets


@pytest.mark.parametrize("names", [MARKET, DUKE, MSMT17])
def test_written_folders_are_read_again(tmp_path, names):
    images = photos(names)
    assert write_meshes(tmp_path / "train", images, height=32, width=16, quiet=True) == 2
    below = "" if names is not MSMT17 else "0000/"
    assert (tmp_path / "train" / "render_45" / below / names[0].split("/")[-1]).is_file()
    drawn = make_meshes(images, height=32, width=16, quiet=True)
    meshes = open_meshes(tmp_path, images)
    for row in range(2):
        for turn in range(8):
            off = meshes.at(row, turn).astype(int) - drawn.at(row, turn)
            assert np.abs(off).mean() < 3  # JPEG
            assert meshes.at(row, turn)[0, 0] > 250


def test_png_is_exact_and_what_is_there_is_kept(tmp_path):
    images = photos(["a.png", "b.png", "c"])
    size = {"height": 16, "width": 8, "quiet": True}
    assert write_meshes(tmp_path, images, **size) == 3
    drawn = make_meshes(images, **size)
    meshes = open_meshes(tmp_path, images)
    for row, turn in itertools.product(range(3), range(8)):
        np.testing.assert_array_equal(meshes.at(row, turn), drawn.at(row, turn))
    Image.new("L", (8, 16)).save(tmp_path / "render_90" / "b.png")
    (tmp_path / "render_135" / "b.png").unlink()
    assert write_meshes(tmp_path, images, **size) == 1
    assert (open_meshes(tmp_path, images).at(1, 2) == 0).all()
    np.testing.assert_array_equal(open_meshes(tmp_path, images).at(1, 3), drawn.at(1, 3))
    assert write_meshes(tmp_path, images, **size) == 0
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".")]


def test_workers_change_nothing(tmp_path):
    names = [f"{row}.png" for row in range(20)]
    images = photos(names)
    keypoints = {"3.png": seen_keypoints(somebody(), 2.0, SHAPE[::-1])}
    size = {"height": 16, "width": 8, "quiet": True, "keypoints": keypoints}
    one, two = make_meshes(images, **size), make_meshes(images, **size, workers=2)
    np.testing.assert_array_equal(one.pixels, two.pixels)
    write_meshes(tmp_path, images, **size, workers=2)
    np.testing.assert_array_equal(open_meshes(tmp_path, images).at(3, 5), one.at(3, 5))


def test_each_photo_gets_the_best_that_is_known(tmp_path, capsys):
    names = ["set/a.jpg", "set/b.jpg", "set/c.jpg"]
    np.savez(tmp_path / "model.npz", **made_up_model())
    file = poses(tmp_path / "poses.npz", ["a.jpg"], [(0.4, 0, 0)])
    keypoints = {
        name: seen_keypoints(walking(2.0, 1.0), 2.0, SHAPE[::-1]) for name in ("a.jpg", "b.jpg")
    }
    images, size = photos(names), {"height": 32, "width": 16}
    plain = make_meshes(images, **size, quiet=True)
    drawn = make_meshes(images, **size, keypoints=keypoints, smpl=(tmp_path / "model.npz", file))
    said = capsys.readouterr().err
    assert "1 of 3 photos have no keypoints, the first set/c.jpg" in said
    assert "2 of 3 photos have no poses, the first set/b.jpg" in said
    bodies = read_bodies(tmp_path / "model.npz", file)
    np.testing.assert_array_equal(drawn.pixels[0], bodies.turns(0, size=SHAPE[::-1], **size))
    np.testing.assert_array_equal(drawn.pixels[2], plain.pixels[2])
    assert (drawn.pixels[1] != plain.pixels[1]).any()
    message = raised(lambda: make_meshes(images, keypoints={"z.jpg": keypoints["a.jpg"]}))
    assert "must be of these photos, such as set/a.jpg, got those of z.jpg" in message
    assert "height and width" in raised(lambda: make_meshes(images, height=2))
    tracklets = Tracklets(images, [[0], [1, 2]])
    assert "got tracklets" in raised(lambda: make_meshes(tracklets))


# --- Made-up people


PEOPLE = People(ids=3, test_ids=2, cameras=3, images=2, height=64, width=32, occlusion=0)


def test_true_bodies_of_made_up_people():
    data = people_data(PEOPLE, quiet=True)
    meshes = people_meshes(PEOPLE, quiet=True)
    images = MeshedImages(data.train, meshes)
    assert images.names == meshes.names
    rows = range(len(images))
    turned = turned_photos(PEOPLE, "train", rows)
    for row in rows:
        np.testing.assert_array_equal(turned[row, 0], data.train.pixels[row])
    # Where no body is, a turned person changes nothing but the shadow.
    change = np.abs(turned[:, :1].astype(int) - turned).mean(axis=-1)
    covered = silhouettes(meshes.pixels[:, :1]) | silhouettes(meshes.pixels)
    apart = (slice(None), slice(1, None), slice(None, 44))
    assert change[apart][covered[apart]].mean() > 3 * change[apart][~covered[apart]].mean()
    assert (turned_photos(PEOPLE, "query", [1], [4, 0])[0, 1] == data.query.pixels[1]).all()
    assert turned_photos(PEOPLE, "train", []).shape == (0, 8, 64, 32, 3)
    assert "must be one of train, query, gallery" in raised(
        lambda: turned_photos(PEOPLE, "test", [0])
    )


def test_turned_by_a_half_the_body_is_mirrored_but_for_the_view_from_above():
    meshes = people_meshes(PEOPLE, "gallery", quiet=True)
    seen = silhouettes(meshes.pixels)
    for row in range(len(meshes)):
        upright = seen[row, 0].any(axis=0).sum(), seen[row, 4].any(axis=0).sum()
        assert abs(upright[0] - upright[1]) < 8
        assert seen[row].mean(axis=(1, 2)).min() > 0.08


def test_nobody_has_no_body():
    crowd = People(ids=1, test_ids=1, cameras=2, images=2, distractors=2, height=32, width=16)
    meshes = people_meshes(crowd, "gallery", quiet=True)
    blank = (meshes.pixels == 255).all(axis=(1, 2, 3))
    names = people_data(crowd, quiet=True).gallery.names
    assert meshes.names == names
    assert sum(name.split("/")[1].startswith("0000") for name in names) == 2
    assert blank.sum() == 1


# --- pyreid mesh


def test_command(tmp_path, capsys):
    write_market(tmp_path / "data", PEOPLE, quiet=True)
    out = tmp_path / "meshes"
    command = [str(tmp_path / "data"), "-o", str(out), "--height", "32", "--width", "16"]
    assert commands.main(command) == 0
    images = open_data(tmp_path / "data")
    assert f"each of {len(images.train)} photos: {out / 'train'}" in capsys.readouterr().out
    assert commands.main(command) == 0
    assert f"of 0 photos, {len(images.train)} were there" in capsys.readouterr().out
    assert commands.main([*command, "--cache", "--subset", "all"]) == 0
    assert commands.main([*command, "--cache", "--subset", "all"]) == 0
    for subset, chosen in images.subsets.items():
        meshes = open_meshes(out, chosen, subset=subset)
        true = people_meshes(dataclasses.replace(PEOPLE), subset, quiet=True)
        assert meshes.names == true.names == chosen.names
        for turn in range(8):  # drawn at another size
            large = true.at(0, turn).reshape(32, 2, 16, 2).mean(axis=(1, 3))
            assert np.abs(meshes.at(0, turn) - large).mean() < 8
    assert sorted(path.name for path in out.iterdir()) == ["test.npz", "train", "train.npz"]


def test_command_on_a_folder_with_keypoints(tmp_path, capsys):
    for row in range(3):
        Image.new("RGB", SHAPE[::-1]).save(tmp_path / f"{row}.png")
    keypoints = {"1.png": seen_keypoints(somebody(), 2.0, SHAPE[::-1]).tolist()}
    (tmp_path / "k.json").write_text(json.dumps(keypoints))
    out = tmp_path / "out"
    command = [str(tmp_path), "-o", str(out), "--images", "--height", "16", "--width", "8"]
    assert commands.main([*command, "--keypoints", str(tmp_path / "k.json")]) == 0
    assert "2 of 3 photos have no keypoints" in capsys.readouterr().err
    images = open_folder(tmp_path).train.select(range(3))
    expected = make_meshes(images, height=16, width=8, keypoints=tmp_path / "k.json", quiet=True)
    meshes = open_meshes(out, images)
    np.testing.assert_array_equal(meshes.at(1, 6), expected.at(1, 6))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nowhere"], "nowhere does not exist"),
        (["data", "--smpl", "m.npz"], "--smpl and --poses: one takes the other"),
        (["data", "--smpl", "m.npz", "--poses", "p.npz"], "m.npz: no such file"),
        (["data", "--keypoints", "k.json"], "k.json: no such file"),
        (["data", "--height", "1"], "height and width"),
        (["crops", "--images", "--subset", "test"], "has no images to test with"),
    ],
)
def test_command_errors(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    for name in ("bounding_box_train", "query", "bounding_box_test"):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("RGB", (8, 16)).save(tmp_path / "data" / name / "0001_c1.png")
    (tmp_path / "crops").mkdir()
    Image.new("RGB", (8, 16)).save(tmp_path / "crops" / "a.png")
    assert commands.main([*arguments, "-o", "out"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("pyreid mesh: ")
    assert message in error
    assert not (tmp_path / "out").exists()
