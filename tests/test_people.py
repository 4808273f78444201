"""Made-up people: the renderer against brute force, bodies and outfits by what must be seen of them, the data
by what training counts on."""

import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyreid import ops, people
from pyreid.data.layouts import open_data
from pyreid.people import People, contact_sheet, people_data, photograph, write_market
from pyreid.people.body import JOINTS, Capsules, Part, Proportions, body, skeleton, walking
from pyreid.people.capture import Person, visits
from pyreid.people.render import lit, render
from pyreid.people.wardrobe import Cloth, Outfit

PHASES = st.floats(0, 2 * np.pi)
STANDING = walking(0, stride=0)
SMALL = {
    "ids": 6,
    "test_ids": 4,
    "cameras": 3,
    "images": 3,
    "height": 32,
    "width": 16,
    "quiet": True,
}


def somebody(pose=STANDING, proportions=None):
    proportions = proportions or Proportions()
    return skeleton(proportions, pose).attach(body(proportions))


def capsule(start, end, radii):
    return Capsules(
        start=np.array([start], dtype=float),
        end=np.array([end], dtype=float),
        radii=np.array([radii], dtype=float),
        part=np.zeros(1, dtype=np.int64),
        origin=np.zeros((1, 3)),
        axes=np.eye(3)[None],
        unit=1.0,
    )


def mirrored(pose):
    """Left and right change places."""
    swapped = {"left": "right", "right": "left"}
    names = [" ".join(swapped.get(word, word) for word in name.split()) for name in JOINTS]
    return pose[[JOINTS[name] for name in names]] * (1, -1, -1)


# --- body


@given(PHASES, st.floats(0, 1.2))
@settings(max_examples=30, deadline=None)
def test_half_a_cycle_later_left_is_right(phase, stride):
    np.testing.assert_allclose(
        walking(phase + np.pi, stride), mirrored(walking(phase, stride)), atol=1e-12
    )


@given(PHASES, st.floats(0, 1.2), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_feet_are_on_the_ground_and_heads_at_their_height(phase, stride, seed):
    proportions = Proportions.draw(np.random.default_rng(seed))
    _, bottom, _, top = somebody(walking(phase, stride), proportions).box()
    assert abs(bottom) < 0.02 * proportions.stature
    assert 0.85 * proportions.stature < top < 1.03 * proportions.stature


def test_bones_keep_their_lengths():
    one, other = (skeleton(Proportions(), walking(phase)).positions for phase in (0.3, 2.0))
    for a, b in (("left hip", "left knee"), ("right elbow", "right wrist"), ("pelvis", "chest")):
        lengths = [np.linalg.norm(joints[JOINTS[a]] - joints[JOINTS[b]]) for joints in (one, other)]
        assert lengths[0] == pytest.approx(lengths[1])


# --- render

COORDINATE = st.floats(-0.6, 0.6)
POINT = st.tuples(COORDINATE, COORDINATE, COORDINATE)
RADIUS = st.floats(0.05, 0.4)


@given(POINT, POINT, st.tuples(RADIUS, RADIUS))
@settings(max_examples=60, deadline=None)
def test_a_tapered_capsule_is_a_row_of_spheres(start, end, radii):
    window = (-1, -1, 1, 1)
    depth = render(capsule(start, end, radii), 24, 24, window=window)
    centre = -1 + 2 * (np.arange(24) + 0.5) / 24
    x, y, t = centre[None, :, None], -centre[:, None, None], np.linspace(0, 1, 801)
    a, b = np.array(start), np.array(end)
    middle, radius = a + t[:, None] * (b - a), radii[0] + t * (radii[1] - radii[0])
    q = radius**2 - (x - middle[:, 0]) ** 2 - (y - middle[:, 1]) ** 2
    expected = np.where(q > 0, middle[:, 2] + np.sqrt(np.maximum(q, 0)), -np.inf).max(axis=2)
    found = depth.picture(depth.depth, -np.inf)
    edge = np.abs(q.max(axis=2)) < 2e-3  # grazed: a rounding decides
    with np.errstate(invalid="ignore"):
        close = np.abs(found - expected) < 2e-3
    assert (close | (found == expected) | edge).all()


def test_a_sphere():
    window = (-1, -1, 1, 1)
    surface = render(capsule((0, 0, 0.5), (0, 0, 0.5), (0.8, 0.8)), 64, 64, window=window)
    x, y, z = surface.normals.T
    np.testing.assert_allclose(surface.depth, 0.5 + 0.8 * z, atol=1e-5)
    np.testing.assert_allclose(surface.coordinates[:, :2], 0.8 * surface.normals[:, :2], atol=1e-5)
    assert len(surface.pixels) == pytest.approx(np.pi * (0.4 * 64) ** 2, rel=0.01)
    assert lit(surface.normals, np.array([0.0, 0, 1]), 0.3).max() == pytest.approx(1, abs=1e-2)


def test_the_nearer_hides_the_farther():
    near = somebody().moved((0, 0, 3.0))
    both = Capsules(
        *(
            np.concatenate([getattr(near, name), getattr(somebody(), name)])
            for name in ("start", "end", "radii", "part", "origin", "axes")
        ),
        unit=near.unit,
    )
    alone, together = render(near, 64, 32), render(both, 64, 32)
    np.testing.assert_array_equal(alone.pixels, together.pixels)
    np.testing.assert_array_equal(alone.depth, together.depth)


@given(PHASES, st.floats(-np.pi, np.pi))
@settings(max_examples=20, deadline=None)
def test_from_behind_the_silhouette_is_mirrored(phase, yaw):
    window = (-0.8, -0.1, 0.8, 2.0)
    front, back = (
        render(somebody(walking(phase)).turned(angle), 84, 64, window=window).silhouette()
        for angle in (yaw, yaw + np.pi)
    )
    assert (front != back[:, ::-1]).mean() < 2e-3  # a pixel that an edge crosses, by rounding


@given(PHASES, st.floats(-np.pi, np.pi))
@settings(max_examples=20, deadline=None)
def test_the_mirrored_pose_turned_the_other_way_is_the_mirrored_picture(phase, yaw):
    pose, light = walking(phase), np.array([0, 0.6, 0.8])
    window = (-0.8, -0.1, 0.8, 2.0)
    pictures = []
    for angle, moved in ((yaw, pose), (-yaw, mirrored(pose))):
        surface = render(somebody(moved).turned(angle, 0.2), 84, 64, window=window)
        pictures.append(surface.picture(lit(surface.normals, light)))
    assert (np.abs(pictures[0] - pictures[1][:, ::-1]) > 0.02).mean() < 5e-3


def test_coordinates_stay_with_the_body():
    capsules = somebody(walking(1.0)).turned(0.7, 0.2)
    surface = render(capsules, 128, 64)
    first = [int(np.flatnonzero(capsules.part == part)[0]) for part in range(16)]
    k = np.array(first)[surface.parts]
    points = capsules.origin[k] + capsules.unit * np.einsum(
        "vij,vj->vi", capsules.axes[k], surface.coordinates
    )
    np.testing.assert_allclose(points[:, 2], surface.depth, atol=1e-5)


def seen_of(capsules, *parts):
    return int(np.isin(render(capsules, 256, 128).parts, parts).sum())


def test_the_far_arm_goes_out_of_sight_as_the_body_turns():
    arm = (Part.LEFT_UPPER_ARM, Part.LEFT_FOREARM, Part.LEFT_HAND)
    shown = [seen_of(somebody().turned(np.radians(angle)), *arm) for angle in range(0, 91, 15)]
    assert shown == sorted(shown, reverse=True)
    assert shown[0] > 500
    assert shown[-1] == 0
    other = [seen_of(somebody().turned(-np.radians(angle)), *arm) for angle in (0, 90)]
    assert min(other) > 500


# --- wardrobe


def dressed(**worn):
    """The first drawn outfit with what is asked for, on an average body."""
    for seed in range(2000):
        outfit = Outfit.draw(np.random.default_rng(seed))
        if all(getattr(outfit, name) == value for name, value in worn.items()):
            pieces = outfit.dress(body(Proportions()))
            return outfit, skeleton(Proportions(), STANDING).attach(pieces)
    raise AssertionError(worn)


def test_a_backpack_is_seen_from_behind():
    _, capsules = dressed(bag="backpack")
    assert seen_of(capsules.turned(np.pi), Part.BAG) > 5 * seen_of(capsules, Part.BAG)


@pytest.mark.parametrize("bag", ["shoulder", "hand"])
def test_a_bag_has_a_side(bag):
    """From the front, what is carried on the left is in the right half of the picture."""
    for side in (1, -1):
        _, capsules = dressed(bag=bag, bag_side=side)
        for yaw, half in ((0, side), (np.pi, -side)):
            surface = render(capsules.turned(yaw), 256, 128)
            columns = surface.pixels[surface.parts == Part.BAG] % 128
            assert half * (columns.mean() - 63.5) > 8


def test_an_open_jacket_shows_the_shirt_in_front():
    red, blue = (Cloth("plain", np.array(c), np.zeros(3)) for c in ((1, 0, 0), (0, 0, 1)))
    outfit, capsules = dressed(sleeves="long", bag="none", coat=0.0)
    outfit = replace(outfit, top=blue, shirt=red)

    def share(yaw):
        surface = render(capsules.turned(yaw), 256, 128)
        paint = outfit.paint(surface)[surface.parts == Part.TORSO]
        return ((paint[:, 0] > 0.5) & (paint[:, 2] == 0)).mean()

    assert 0.1 < share(0) < 0.6
    assert share(np.pi) == 0


def test_every_outfit_covers_and_paints():
    for seed in range(40):
        who = Person.draw(np.random.default_rng(seed))
        surface = render(who.walk(1.0, 1.0, "none"), 64, 32)
        paint = who.outfit.paint(surface)
        assert paint.shape == (len(surface.pixels), 3)
        assert paint.dtype == np.float32
        assert paint.min() >= 0
        assert paint.max() <= 1.1


# --- data


@pytest.fixture(scope="module")
def data():
    return people_data(**SMALL)


def pixels_of(subset):
    return dict(zip(subset.names, subset.pixels, strict=True))


def test_same_seed_same_bits_whatever_the_workers(data):
    again = people_data(**SMALL, workers=2)
    other = people_data(**SMALL, seed=1)
    for name, subset in data.subsets.items():
        np.testing.assert_array_equal(subset.pixels, again.subsets[name].pixels)
        assert subset.names == again.subsets[name].names
    assert (data.train.pixels[0] != other.train.pixels[0]).any()


@pytest.mark.parametrize("more", [{"ids": 9}, {"test_ids": 6}, {"images": 5}, {"junk": 3}])
def test_a_larger_set_holds_the_smaller(data, more):
    larger = people_data(**{**SMALL, **more})
    for name, subset in data.subsets.items():
        found = pixels_of(larger.subsets[name])
        assert set(subset.names) <= set(found)
        assert all((image == found[name]).all() for name, image in pixels_of(subset).items())


def test_a_picture_does_not_depend_on_those_before_it(data):
    picture = photograph(0, 3, 1, 2, height=32, width=16)
    photograph(0, 8, 0, 0, height=32, width=16)
    np.testing.assert_array_equal(picture, photograph(0, 3, 1, 2, height=32, width=16))
    assert (picture != photograph(0, 3, 1, 1, height=32, width=16)).any()
    assert (picture != photograph(1, 3, 1, 2, height=32, width=16)).any()


def test_subsets(data):
    train, query, gallery = data.train, data.query, data.gallery
    assert len(np.unique(train.ids)) == 6
    assert len(np.unique(query.ids)) == 4
    assert set(query.ids) == set(gallery.ids)
    assert not set(train.ids) & set(query.ids)
    assert set(train.cameras) == {0, 1, 2}
    for subset, images in ((train, 3), (query, 1), (gallery, 2)):
        pairs = list(zip(subset.ids, subset.cameras, strict=True))
        assert all(pairs.count(pair) == images for pair in set(pairs))
        cameras = {who: {camera for other, camera in pairs if other == who} for who, _ in pairs}
        assert min(map(len, cameras.values())) >= 2
    for subset in (train, query, gallery):
        for name, who, camera in zip(subset.names, subset.ids, subset.cameras, strict=True):
            found = re.fullmatch(r"\w+/(\d{4})_c(\d)s1_\d{6}_\d\d\.jpg", name)
            assert (int(found[1]), int(found[2]) - 1) == (who, camera)


@given(st.integers(0, 50), st.integers(0, 10**9), st.integers(1, 12))
@settings(max_examples=50, deadline=None)
def test_visits(seed, who, cameras):
    found = visits(seed, who, cameras)
    assert min(2, cameras) <= len(found) <= cameras
    assert sorted(set(found)) == found
    assert set(found) <= set(range(cameras))


def test_not_everyone_is_everywhere():
    counts = {len(visits(0, who, 4)) for who in range(100)}
    assert counts == {2, 3, 4}


def test_distractors_and_junk():
    gallery = people_data(**SMALL, distractors=5, junk=4).gallery
    assert (gallery.ids == 0).sum() == 5
    assert (gallery.ids == -1).sum() == 4


def test_written_as_market_and_read_again(tmp_path, data):
    write_market(tmp_path / "made", **SMALL)
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == [
        *("bounding_box_test", "bounding_box_train", "people.json", "query"),
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    read = open_data(tmp_path / "made")
    for name, subset in data.subsets.items():
        found = read.subsets[name]
        assert found.names == subset.names
        np.testing.assert_array_equal(found.ids, subset.ids)
        np.testing.assert_array_equal(found.cameras, subset.cameras)
        np.testing.assert_array_equal(found.frames, subset.frames)
        assert set(subset.frames.tolist()) <= {1, 26, 51}
    image, _, _ = read.train[0]
    error = np.abs(np.asarray(image).astype(float) - data.train.pixels[0])
    assert 0 < error.mean() < 12


def test_write_market_leaves_what_is_there(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError) as error:
        write_market(tmp_path, **SMALL)
    assert str(error.value) == f"write_market: {tmp_path} must be new or an empty folder"
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_write_market_when_interrupted(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(people, "_written", interrupt)
        with pytest.raises(KeyboardInterrupt):
            write_market(tmp_path / "made", **SMALL)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".made.unfinished").mkdir()  # as a killed run leaves it
    with pytest.raises(ValueError, match=r": delete it$"):
        write_market(tmp_path / "made", **SMALL)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"ids": 0}, "People: ids must be at least 1, got 0"),
        ({"images": 1}, "People: images must be at least 2, got 1"),
        ({"seed": -1}, "People: seed must be at least 0, got -1"),
        ({"occlusion": 1.5}, "People: occlusion must be at most 1, got 1.5"),
        ({"gap": -0.1}, "People: gap must be at least 0, got -0.1"),
        ({"width": 200}, "People: width must be at most twice the height 64, got 200"),
        ({"ids": 1, "junk": 2}, "People: junk must be 0 where there are no test people"),
    ],
)
def test_errors(changes, message):
    with pytest.raises(ValueError) as error:
        people_data(**changes)
    assert str(error.value) == message


def test_options_have_meanings():
    assert all(field.metadata["help"] for field in People.__dataclass_fields__.values())


def test_contact_sheet():
    sheet = contact_sheet(rows=2, views=(0, 4), cameras=3, height=32, width=16)
    assert sheet.size == (3 * 2 * 16, 2 * 32)


# --- what training finds in it


@pytest.fixture(scope="module")
def crowd():
    return people_data(ids=1, test_ids=24, height=48, width=24, quiet=True)


def histograms(images):
    """Of the colours of each whole image, 8 levels to a channel; their roots have unit norm."""
    levels = images.pixels.astype(np.int64) // 32
    codes = (levels[..., 0] * 8 + levels[..., 1]) * 8 + levels[..., 2]
    counts = np.stack([np.bincount(code.ravel(), minlength=512) for code in codes])
    return np.sqrt(counts / counts.sum(axis=1, keepdims=True)).astype(np.float32)


def test_colours_alone_find_the_camera_rather_than_the_person(crowd):
    query, gallery = histograms(crowd.query), histograms(crowd.gallery)
    ranking = ops.evaluate_ranking(
        query,
        gallery,
        query_ids=crowd.query.ids,
        gallery_ids=crowd.gallery.ids,
        query_cameras=crowd.query.cameras,
        gallery_cameras=crowd.gallery.cameras,
    )
    assert ranking.mAP < 0.35
    nearest = np.argsort(-query @ gallery.T, axis=1)[:, :5]
    same = crowd.gallery.cameras[nearest] == crowd.query.cameras[:, None]
    assert same.mean() > 0.8


def test_cameras_differ_in_their_statistics(crowd):
    colours, cameras = crowd.gallery.pixels.mean(axis=(1, 2)), crowd.gallery.cameras
    means = np.stack([colours[cameras == camera].mean(axis=0) for camera in range(6)])
    apart = np.linalg.norm(means[:, None] - means, axis=-1)[np.triu_indices(6, 1)]
    within = np.mean([colours[cameras == camera].std(axis=0).mean() for camera in range(6)])
    assert np.median(apart) > 1.5 * within


def test_clothes_look_more_alike_than_those_of_others():
    """Where cameras differ little, the colours of chest and legs tell people apart."""
    crowd = people_data(ids=1, test_ids=24, gap=0, occlusion=0, height=48, width=24, quiet=True)
    pixels = crowd.gallery.pixels.astype(float)
    chest, legs = pixels[:, 12:20, 9:15], pixels[:, 27:34, 9:15]
    worn = np.concatenate([np.median(part, axis=(1, 2)) for part in (chest, legs)], axis=1)
    distance = np.linalg.norm(worn[:, None] - worn, axis=-1)
    ids, cameras = crowd.gallery.ids, crowd.gallery.cameras
    across = cameras[:, None] != cameras
    same = ids[:, None] == ids
    assert np.median(distance[across & same]) < 0.55 * np.median(distance[across & ~same])
