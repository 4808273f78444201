"""Body pictures: found in the released folders, kept in one file, joined to photos; and made."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pyreid.data import (
    ANGLES,
    ImageArrays,
    MeshArrays,
    MeshedImages,
    MeshFolders,
    Photo,
    Tracklets,
    batches,
    open_meshes,
    save_meshes,
)
from pyreid.data.transforms import MeshView, View, make

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
    for turns in ((), (8,), (-1, 2)):
        assert "some of 0 to 7" in raised(lambda turns=turns: MeshView(4, 2, turns))


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
