"""Image sets and the folders they come in: the nestings that users have, and what is said of broken ones."""

import os
import pickle
import re
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from pyreid.data import (
    ImageArrays,
    ImageError,
    ImageFiles,
    Images,
    ReidData,
    as_images,
    frame_numbers,
    open_csv,
    open_data,
    open_folder,
    readable,
)
from pyreid.data.images import Counts
from pyreid.data.layouts import PUBLISHED

MARKET = ("bounding_box_train", "query", "bounding_box_test")


def put(path, *, shade=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 8), (shade, shade, shade)).save(path)


def put_market(folder, pattern="{id}_c{camera}s1_00000{k}_01.jpg"):
    """Cameras 1 and 6 in train, 2 and 6 in query and gallery; junk and a distractor in the gallery."""
    images = [
        (MARKET[0], "0007", 6),
        (MARKET[0], "0002", 1),
        (MARKET[0], "0002", 6),
        (MARKET[1], "0003", 2),
        (MARKET[2], "0003", 6),
        (MARKET[2], "0000", 2),
        (MARKET[2], "-1", 6),
    ]
    for k, (below, person, camera) in enumerate(images):
        put(folder / below / pattern.format(id=person, camera=camera, k=k))


def put_msmt17(folder, train="train", test="test"):
    lists = {
        "train": [("0001", 1, 12), ("0000", 0, 3)],
        "val": [("0000", 0, 1)],
        "query": [("0000", 0, 15)],
        "gallery": [("0000", 0, 3), ("0002", 2, 15)],
    }
    for name, images in lists.items():
        lines = []
        for k, (person, number, camera) in enumerate(images):
            image = f"{person}/{person}_{k:03d}_{camera:02d}_0303morning_0015_{k}.jpg"
            put(folder / (train if name in ("train", "val") else test) / image)
            lines.append(f"{image} {number}\n")
        (folder / f"list_{name}.txt").write_text("".join(lines))


def quietly(*args, **options):
    """open_data of a toy under the name of a published data set."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*half unpacked.*")
        return open_data(*args, **options)


def refused(call):
    with pytest.raises(ValueError) as error:
        call()
    return str(error.value)


# --- Image sets


def arrays(count=5):
    pixels = np.arange(count, dtype=np.uint8)[:, None, None, None] * np.ones((1, 8, 4, 3), np.uint8)
    numbers = np.arange(count)
    return ImageArrays(pixels, ids=numbers - 1, cameras=numbers % 2, frames=10 * numbers - 1)


def test_images_in_memory():
    images = arrays()
    image, known, camera = images[3]
    assert (image.mode, image.size, known, camera) == ("RGB", (4, 8), 2, 1)
    assert np.asarray(image).tolist() == images.pixels[3].tolist()
    assert images.names == ("000000", "000001", "000002", "000003", "000004")
    assert images[-1][1] == 3
    assert [known for _, known, _ in images] == [-1, 0, 1, 2, 3]
    with pytest.raises(IndexError):
        images[5]


@pytest.mark.parametrize(
    "rows, expected",
    [
        ([4, 1], [4, 1]),
        (np.array([False, True, False, False, True]), [1, 4]),
        (slice(1, None, 2), [1, 3]),
        ([], []),
    ],
)
def test_selected_images(rows, expected):
    chosen = arrays().select(rows)
    assert [int(np.asarray(image)[0, 0, 0]) for image, _, _ in chosen] == expected
    assert chosen.names == tuple(f"{row:06d}" for row in expected)
    assert chosen.ids.tolist() == [row - 1 for row in expected]
    assert chosen.cameras.tolist() == [row % 2 for row in expected]
    assert chosen.frames.tolist() == [10 * row - 1 for row in expected]


def test_selection_of_a_selection_in_another_process():
    chosen = pickle.loads(pickle.dumps(arrays().select([4, 2, 0]).select([2, 1])))
    assert [int(np.asarray(image)[0, 0, 0]) for image, _, _ in chosen] == [0, 2]


def test_files_are_read_in_rgb_when_asked_for(tmp_path):
    Image.new("L", (4, 8), 9).save(tmp_path / "grey.png")
    images = ImageFiles(tmp_path, ["not there.jpg", "grey.png"], cameras=[1, 0])
    image, known, camera = images[1]
    assert (image.mode, image.getpixel((0, 0)), known, camera) == ("RGB", (9, 9, 9), -1, 0)
    assert refused(lambda: images[0]) == f"{tmp_path}/not there.jpg: no such image"


@pytest.mark.parametrize("cut", [0, 20, 300])
def test_corrupt_file_is_named(tmp_path, cut):
    path = tmp_path / "a.jpg"
    noise = np.random.default_rng(0).integers(0, 255, (32, 16, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ImageError, match=re.escape(f"{path}: cannot be read as an image: ")):
        ImageFiles(tmp_path, ["a.jpg"])[0]
    put(tmp_path / "b.jpg")
    images = ImageFiles(tmp_path, ["a.jpg", "b.jpg", "c.jpg"])
    for threads in (1, 3):
        assert readable(images, threads=threads).tolist() == [1]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: Images(["a", "b", "a"]), "Images: names must be distinct, got 'a' more than once"),
        (
            lambda: ImageFiles(".", ["a"], ids=[0, 1]),
            "ImageFiles: ids must be whole numbers of shape (1,), got int64 (2,)",
        ),
        (
            lambda: Images(["a"], cameras=[0.5]),
            "Images: cameras must be whole numbers of shape (1,), got float64 (1,)",
        ),
        (lambda: Images(["a"], cameras=[-1]), "Images: cameras must not be negative, got -1"),
        (lambda: Images(["a"], frames=[-2]), "Images: frames must be at least -1, got -2"),
        (lambda: Images(["a"], ids=[-2]), "Images: ids must be at least -1, got -2"),
        (
            lambda: ImageArrays(np.zeros((2, 3, 8, 4), np.uint8)),
            "ImageArrays: pixels must be uint8 (N, H, W, 3), got uint8 (2, 3, 8, 4)",
        ),
        (
            lambda: ImageArrays(np.zeros((2, 8, 4, 3), np.uint8), ["a"]),
            "ImageArrays: names must be one per image, got 1 for 2 images",
        ),
        (lambda: arrays().select([1, 1]), "select: rows must be distinct, got some more than once"),
        (
            lambda: as_images(iter([])),
            "as_images: dataset must have __len__ and __getitem__ (map-style), got list_iterator",
        ),
        (
            lambda: as_images([torch.zeros(3, 8, 4)]),
            "as_images: items must be (image, id, camera), got a tensor of torch.float32 (3, 8, 4) at 0",
        ),
        (
            lambda: as_images([(torch.zeros(3, 8, 4), 0, 0)])[0],
            "as_images: image must be PIL's or a uint8 tensor (3, H, W), "
            "got a tensor of torch.float32 (3, 8, 4) at 0",
        ),
    ],
)
def test_errors_of_image_sets(call, message):
    assert refused(call) == message


def test_dataset_of_anybody():
    grey = Image.new("L", (4, 8), 7)
    tensor = torch.arange(3 * 8 * 4, dtype=torch.uint8).reshape(3, 8, 4)
    images = as_images([(grey, 5, 1), (tensor, -1, torch.tensor(0))])
    assert isinstance(images, Images)
    assert images.ids.tolist() == [5, -1]
    assert images.cameras.tolist() == [1, 0]
    assert images[0][0].getpixel((0, 0)) == (7, 7, 7)
    assert torch.equal(torch.from_numpy(np.array(images[1][0])).permute(2, 0, 1), tensor)
    assert images.select([1])[0][1:] == (-1, 0)
    assert as_images(images) is images


def test_dataset_is_not_read_for_what_is_given():
    class Counting(list):
        asked = 0

        def __getitem__(self, place):
            self.asked += 1
            return super().__getitem__(place)

    dataset = Counting([(Image.new("RGB", (4, 8)), 0, 0)] * 3)
    images = as_images(dataset, ids=[2, 1, 0], cameras=[0, 0, 1], names="abc")
    assert dataset.asked == 0
    assert images[2][1:] == (0, 1)
    assert images.names == ("a", "b", "c")


def test_failing_dataset_is_a_corrupt_image():
    class Failing(list):
        def __getitem__(self, place):
            raise OSError("disk on fire")

    images = as_images(Failing([0]), ids=[0], cameras=[0])
    with pytest.raises(ImageError, match=re.escape("item 0 of the dataset: disk on fire")):
        images[0]


def test_summary():
    images = arrays(1200)
    data = ReidData("mine", images, images.select(slice(10)), images.select([0]))
    assert data.cameras == 2
    assert data.summary().splitlines() == [
        "mine",
        "subset  |   ids | images | cameras",
        "--------+-------+--------+--------",
        "train   | 1,199 |  1,200 |       2",
        "query   |     9 |     10 |       2",
        "gallery |     - |      1 |       1",
    ]


def test_summary_says_what_is_missing():
    published = {"train": Counts(5, 7), "query": Counts(1, 1)}
    data = ReidData("mine", arrays(5), published=published)
    lines = [
        "mine: train should have 7 images of 5 ids, found 4 of 4: half unpacked?",
        "mine: query should have 1 images of 1 ids, found 0 of 0: half unpacked?",
    ]
    assert data.differences() == lines
    assert data.summary().splitlines()[-2:] == lines


# --- Layouts


NESTINGS = [  # below the folder that is given, by the trainers whose users have them
    ("", "market"),
    ("market1501", "market1501"),
    ("market1501/Market-1501-v15.09.15", "market1501"),
    ("Market-1501", "market1501"),
    ("dataset/Market-1501", "market1501"),
    ("dukemtmc-reid/DukeMTMC-reID", "dukemtmc-reid"),
    ("dukemtmcreid/DukeMTMC-reID", "dukemtmc-reid"),
    ("DukeMTMC-reID", "dukemtmc-reid"),
    ("msmt17", "msmt17"),
    ("msmt17/MSMT17_V1", "msmt17"),
]


def test_frames_of_market():
    """Sequences of a camera follow each other, each as long as its last frame; cameras know nothing of each
    other."""
    frames = {
        "train/0002_c1s1_000451_03.jpg": 451,
        "train/0007_c1s2_000100_01.jpg": 900 + 100,
        "test/0007_c1s1_000900_01.jpg": 900,
        "test/-1_c1s10_000030_00.jpg": 900 + 100 + 30,
        "test/0000_c2s2_000005_02.jpg": 5,
        "query/1_c2s4_7_1.png": 5 + 7,
    }
    assert frame_numbers(list(frames)).tolist() == list(frames.values())
    assert frame_numbers(list(reversed(frames))).tolist() == list(reversed(frames.values()))


def test_frames_of_other_names():
    names = [
        "0001_c2_f0046182.jpg",
        "0001_c3_f0046.jpg",
        "0000/0000_000_01_0303morning_0015_0.jpg",
        "0000/0000_001_03_0303afternoon_0040_1_ex.jpg",
        "0001_002_12_0303noon_0020_2.jpg",
        "0001_003_12_1203morning_0002_2.jpg",
        "0001C1T0001F001.jpg",
        "0001_c2.jpg",
        "photo.jpg",
    ]
    slots = [15, 15 + 20 + 40, 15 + 20, 15 + 20 + 40 + 2]
    assert frame_numbers(names).tolist() == [46182, 46, *slots, -1, -1, -1]
    assert frame_numbers([]).dtype == np.int64


@pytest.mark.parametrize("nesting, name", NESTINGS)
@pytest.mark.parametrize(
    "pattern", ["{id}_c{camera}s1_00000{k}_01.jpg", "{id}_c{camera}_f00{k}.jpg"]
)
def test_market_layout(tmp_path, nesting, name, pattern):
    root = tmp_path / "market"
    put_market(root / nesting, pattern)
    (root / nesting / MARKET[0] / "Thumbs.db").write_text("not an image")
    (root / nesting / MARKET[0] / "._0002_c1s1.jpg").write_text("of another system")
    data = quietly(root)
    expected = "market1501" if name == "market" else name
    assert data.name == expected
    assert [name.rsplit("/")[0] for name in data.train.names] == [MARKET[0]] * 3
    assert list(data.train.names) == sorted(data.train.names)
    assert data.train.ids.tolist() == [2, 2, 7]
    assert data.train.cameras.tolist() == [0, 2, 2]
    assert (data.query.ids.tolist(), data.query.cameras.tolist()) == ([3], [1])
    assert data.gallery.ids.tolist() == [-1, 0, 3]
    assert data.gallery.cameras.tolist() == [2, 1, 2]
    assert data.cameras == 3
    assert data.train.frames.tolist() == [1, 2, 0]
    assert data.gallery.frames.tolist() == [6, 5, 4]
    assert data.gallery[0][0].size == (4, 8)
    deepest = quietly(root / nesting)
    assert (deepest.name, deepest.train.names) == (expected, data.train.names)


@pytest.mark.parametrize(
    "nesting", ["", "MSMT17_V2", "msmt17", "msmt17/MSMT17_V1", "msmt17/MSMT17_V2"]
)
@pytest.mark.parametrize("folders", [("train", "test"), ("mask_train_v2", "mask_test_v2")])
def test_msmt17_layout(tmp_path, nesting, folders):
    put_msmt17(tmp_path / nesting, *folders)
    data = quietly(tmp_path)
    train, test = folders
    assert data.name == "msmt17"
    assert data.train.names == (
        f"{train}/0000/0000_000_01_0303morning_0015_0.jpg",
        f"{train}/0000/0000_001_03_0303morning_0015_1.jpg",
        f"{train}/0001/0001_000_12_0303morning_0015_0.jpg",
    )
    assert data.train.ids.tolist() == [0, 0, 1]
    assert data.train.cameras.tolist() == [0, 1, 2]
    assert data.query.cameras.tolist() == [3]
    assert data.gallery.ids.tolist() == [0, 2]
    assert data.gallery.cameras.tolist() == [1, 3]
    assert data.train.frames.tolist() == [15, 15, 15]
    assert [image.size for image, _, _ in data.gallery] == [(4, 8)] * 2


def test_more_than_nine_cameras(tmp_path):
    for camera in (2, 10, 15):
        put(tmp_path / "bounding_box_train" / f"0000_c{camera}_0001.jpg")
    put(tmp_path / "query" / "0001_c9_0001.jpg")
    put(tmp_path / "bounding_box_test" / "0001_c10_0001.jpg")
    data = open_data(tmp_path)
    assert dict(zip(data.train.names, data.train.cameras.tolist(), strict=True)) == {
        "bounding_box_train/0000_c10_0001.jpg": 2,
        "bounding_box_train/0000_c15_0001.jpg": 3,
        "bounding_box_train/0000_c2_0001.jpg": 0,
    }
    assert data.query.cameras.tolist() == [1]


def test_own_data_in_market_layout_is_not_compared(tmp_path):
    put_market(tmp_path / "mine")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = open_data(tmp_path / "mine")
    assert (data.name, data.published) == ("mine", None)
    with pytest.warns(UserWarning, match="half unpacked") as caught:
        assert open_data(tmp_path / "mine", layout="market1501").name == "market1501"
    assert len(caught) == 3


def test_sizes_are_compared(tmp_path):
    put_market(tmp_path / "market1501")
    with pytest.warns(UserWarning, match="half unpacked") as caught:
        open_data(tmp_path)
    assert [str(one.message) for one in caught] == [
        "market1501: train should have 12,936 images of 751 ids, found 3 of 2: half unpacked?",
        "market1501: query should have 3,368 images of 750 ids, found 1 of 1: half unpacked?",
        "market1501: gallery should have 15,913 images of 751 ids, found 2 of 2: half unpacked?",
    ]


def test_whole_data_set_is_not_warned_of(tmp_path, monkeypatch):
    monkeypatch.setitem(
        PUBLISHED,
        "market1501",
        {"train": Counts(2, 3), "query": Counts(1, 1), "gallery": Counts(2, 2)},
    )
    put_market(tmp_path / "market1501")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_data(tmp_path).differences() == []


def test_several_data_sets(tmp_path):
    put_market(tmp_path / "market1501")
    put_market(tmp_path / "dukemtmc-reid/DukeMTMC-reID")
    put_msmt17(tmp_path / "msmt17/MSMT17_V2")
    assert refused(lambda: open_data(tmp_path)) == (
        f"open_data: {tmp_path} holds several data sets, name one of them:\n"
        f"  {tmp_path}/dukemtmc-reid/DukeMTMC-reID  (dukemtmc-reid)\n"
        f"  {tmp_path}/market1501  (market1501)\n"
        f"  {tmp_path}/msmt17/MSMT17_V2  (msmt17)"
    )
    for name in ("market1501", "dukemtmc-reid", "msmt17"):
        assert quietly(tmp_path, layout=name).name == name
    assert quietly(tmp_path / "msmt17").name == "msmt17"


def test_repack_beside_the_lists_it_was_made_of(tmp_path):
    put_market(tmp_path / "msmt17", "{id}_c{camera}_{k}.jpg")
    (tmp_path / "msmt17/list_train.txt").write_text("0000/0000_000_01_x.jpg 0\n")
    assert len(quietly(tmp_path).train) == 3


def test_empty_files_are_left_out(tmp_path):
    put_market(tmp_path)
    (tmp_path / MARKET[0] / "0001_c1s1_000009_01.jpg").touch()
    (tmp_path / MARKET[0] / "0001_c1s1_000008_01.jpg").symlink_to(tmp_path / "gone.jpg")
    first = "0001_c1s1_000008_01.jpg"
    message = f"{tmp_path}/{MARKET[0]}: 2 image files are empty and left out, the first {first}"
    with pytest.warns(UserWarning, match=re.escape(message)):
        assert len(open_data(tmp_path).train) == 3


def test_half_unpacked_market(tmp_path):
    put_market(tmp_path)
    for path in (tmp_path / "query").iterdir():
        path.unlink()
    message = refused(lambda: open_data(tmp_path))
    assert message.splitlines() == [
        f"open_data: {tmp_path} is not whole (half unpacked?): looked for images in bounding_box_train, "
        "query, bounding_box_test; found 3 images in bounding_box_train, 0 images in query, 3 images in "
        "bounding_box_test",
        "where data sets come from (none is downloaded here):",
        '  Market-1501    the project page of its authors ("Scalable Person Re-identification: A Benchmark")',
        "  DukeMTMC-reID  withdrawn by its authors; it is no longer given out",
        '  MSMT17         on request from its authors ("Person Transfer GAN to Bridge Domain Gap")',
        '  MARS           the project page of its authors ("MARS: A Video Benchmark ...")',
        "  DukeMTMC-VideoReID  withdrawn, as DukeMTMC-reID",
    ]


def test_half_unpacked_msmt17(tmp_path):
    put_msmt17(tmp_path)
    (tmp_path / "test/0002/0002_001_15_0303morning_0015_1.jpg").unlink()
    assert refused(lambda: open_data(tmp_path)).splitlines()[0] == (
        f"open_data: {tmp_path} is not whole (half unpacked?): list_gallery.txt lists 2 images, of which 1 "
        "are not in test, the first 0002/0002_001_15_0303morning_0015_1.jpg"
    )
    (tmp_path / "list_val.txt").unlink()
    (tmp_path / "test").rename(tmp_path / "tset")
    assert refused(lambda: open_data(tmp_path)).splitlines()[0] == (
        f"open_data: {tmp_path} is not whole (half unpacked?): looked for list_train.txt, list_val.txt, "
        "list_query.txt, list_gallery.txt, train or mask_train_v2, test or mask_test_v2; found "
        "list_train.txt, list_query.txt, list_gallery.txt, train"
    )


LOOKED = (
    "looked for bounding_box_train, query, bounding_box_test (Market-1501, DukeMTMC-reID), list_train.txt "
    "with train or mask_train_v2 (MSMT17), bbox_train (MARS) and train, query, gallery with tracklets "
    "(DukeMTMC-VideoReID)"
)


def test_nothing_there(tmp_path):
    def first_line(path, **options):
        return refused(lambda: open_data(path, **options)).splitlines()[0]

    nowhere = (
        f"open_data: there is no data set in {tmp_path} or up to 2 levels below: {LOOKED}; found "
    )
    assert first_line(tmp_path) == f"{nowhere}nothing"
    for k in range(10):
        (tmp_path / f"{k}").mkdir()
    assert first_line(tmp_path) == f"{nowhere}0, 1, 2, 3, 4, 5, 6, 7, ..."
    (tmp_path / "Market-1501-v15.09.15.zip").touch()
    assert first_line(tmp_path) == f"{nowhere}Market-1501-v15.09.15.zip: unpack it first"
    put(tmp_path / "3/a/b/c.jpg")
    assert first_line(tmp_path) == (
        f"{nowhere}1 images. To train on images without labels: open_folder({str(tmp_path)!r}), on the "
        f"command line --images {tmp_path}"
    )
    assert first_line(tmp_path / "gone") == f"open_data: {tmp_path}/gone does not exist"
    assert first_line(tmp_path / "3/a/b/c.jpg") == (
        f"open_data: {tmp_path}/3/a/b/c.jpg is no folder and no .csv file"
    )
    put_msmt17(tmp_path / "msmt17")
    assert first_line(tmp_path, layout="market1501").startswith(
        f"open_data: there is no market1501 in {tmp_path} or up to 2 levels below: looked for "
    )
    assert refused(lambda: open_data(tmp_path, layout="viper")) == (
        "open_data: layout must be one of auto, market1501, dukemtmc-reid, msmt17, mars, dukemtmc-videoreid, "
        "got 'viper'"
    )


def test_folder_of_a_data_set(tmp_path):
    put_market(tmp_path)
    assert refused(lambda: open_data(tmp_path / "query")).splitlines()[0] == (
        f"open_data: {tmp_path}/query is one folder of a data set: open {tmp_path}"
    )


def test_names_that_say_nothing(tmp_path):
    put_market(tmp_path)
    put(tmp_path / "query" / "photo.jpg")
    assert refused(lambda: open_data(tmp_path)) == (
        f"open_data: {tmp_path}/query: names must begin with an id and a camera, such as 0002_c1, "
        "got photo.jpg"
    )


def test_lines_that_say_nothing(tmp_path):
    put_msmt17(tmp_path)
    (tmp_path / "list_query.txt").write_text("\n0000/photo.jpg 0\n")
    assert refused(lambda: open_data(tmp_path)) == (
        f"open_data: {tmp_path}/list_query.txt: line 2 must be a path such as 0000/0000_000_01_... and "
        "an id, got '0000/photo.jpg 0'"
    )


# --- Folders of crops


def test_folder_of_crops(tmp_path):
    for name in ("b/2.png", "b/10.JPG", "a/1.jpg", "0.jpeg", ".hidden/3.jpg", "notes.txt"):
        put(tmp_path / name) if name != "notes.txt" else (tmp_path / name).touch()
    data = open_folder(tmp_path)
    assert data.name == tmp_path.name
    assert data.train.names == ("0.jpeg", "a/1.jpg", "b/10.JPG", "b/2.png")
    assert data.train.ids.tolist() == [-1] * 4
    assert data.train.cameras.tolist() == [0] * 4
    assert (data.query, data.gallery) == (None, None)


def test_cameras_of_crops(tmp_path):
    for name in ("door/7_x.jpg", "door/12_y.jpg", "car park/7_z.jpg"):
        put(tmp_path / name)
    by_folder = open_folder(tmp_path, camera=r"(.+)/").train
    assert by_folder.names == ("car park/7_z.jpg", "door/12_y.jpg", "door/7_x.jpg")
    assert by_folder.cameras.tolist() == [0, 1, 1]
    by_number = open_folder(tmp_path, camera=r"/(\d+)_", identity=r"_(.)").train
    assert by_number.cameras.tolist() == [0, 1, 0]
    assert by_number.ids.tolist() == [2, 1, 0]
    assert open_folder(tmp_path, identity=r"/(\d+)").train.ids.tolist() == [7, 12, 7]


def test_links_are_followed_once(tmp_path):
    put(tmp_path / "crops/a.jpg")
    put(tmp_path / "elsewhere/b.jpg")
    os.symlink(tmp_path / "elsewhere", tmp_path / "crops/linked")
    os.symlink(tmp_path / "crops", tmp_path / "elsewhere/back")
    assert open_folder(tmp_path / "crops").train.names == ("a.jpg", "linked/b.jpg")


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"camera": r"c(\d)"},
            r"open_folder: camera must match every path, but 'c(\d)' does not match 1 of 2, the first "
            "a/1.jpg",
        ),
        (
            {"identity": r"\d"},
            r"open_folder: identity must have one group in parentheses, such as '_c(\d+)', got '\d'",
        ),
        (
            {"camera": "("},
            "open_folder: camera must be a regular expression, got '(': missing ), unterminated subpattern "
            "at position 0",
        ),
    ],
)
def test_expressions_that_do_not_fit(tmp_path, options, message):
    put(tmp_path / "a/1.jpg")
    put(tmp_path / "c2.jpg")
    assert refused(lambda: open_folder(tmp_path, **options)) == message


def test_folders_without_images(tmp_path):
    assert refused(lambda: open_folder(tmp_path / "gone")) == (
        f"open_folder: {tmp_path}/gone does not exist"
    )
    assert refused(lambda: open_folder(tmp_path)) == (
        f"open_folder: {tmp_path} holds no images (.jpg, .jpeg, .png, .bmp, .webp, .tif, .tiff, .ppm)"
    )


# --- Lists of images


def write_csv(tmp_path, text):
    for name in ("a.jpg", "b/c.jpg", "d.jpg"):
        put(tmp_path / name)
    path = tmp_path / "people.csv"
    path.write_text(text)
    return path


def test_csv(tmp_path):
    path = write_csv(
        tmp_path,
        "camera,path,id,split\ndoor,d.jpg,anna,query\n10,b/c.jpg,,train\n9,a.jpg,bert,train\n",
    )
    data = open_data(path)
    assert data.name == "people"
    assert data.train.names == ("a.jpg", "b/c.jpg")
    assert data.train.ids.tolist() == [1, -1]
    assert data.train.cameras.tolist() == [1, 0]
    assert (data.query.ids.tolist(), data.query.cameras.tolist(), data.gallery) == ([0], [2], None)
    assert data.train[0][0].size == (4, 8)


def test_csv_of_paths_alone(tmp_path):
    path = write_csv(tmp_path, f"\ufeffpath\n{tmp_path}/a.jpg\nb/c.jpg\n")
    train = open_csv(path).train
    assert train.names == (f"{tmp_path}/a.jpg", "b/c.jpg")
    assert (train.ids.tolist(), train.cameras.tolist()) == ([-1, -1], [0, 0])
    assert train[0][0].size == (4, 8)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "header must name path and may name id, camera, split, got nothing"),
        ("file,id\n", "header must name path and may name id, camera, split, got file,id"),
        (
            "path,split\na.jpg,test\n",
            "line 2: split must be train, query or gallery, got 'test'",
        ),
        (
            "path,camera\na.jpg,1\nd.jpg\n",
            "line 3 must have a path, a camera where there is a column for it, and 2 fields",
        ),
        (
            "path\na.jpg,1\n",
            "line 2 must have a path, a camera where there is a column for it, and 1 fields",
        ),
        ("path,split\na.jpg,query\n", "must list training images, found none"),
        ("path\na.jpg\ne.jpg\nf.jpg\n", "2 of the images are not there, the first e.jpg"),
    ],
)
def test_csv_errors(tmp_path, text, message):
    path = write_csv(tmp_path, text)
    assert refused(lambda: open_csv(path)) == f"open_csv: {path}: {message}"
