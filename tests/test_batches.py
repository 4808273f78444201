"""Views and batches: the released transforms, and randomness that knows no workers."""

import dataclasses
import itertools
import os

import numpy as np
import pytest
import torch
import torchvision.transforms as released
from PIL import Image, ImageFilter

from pyreid.data import Batch, ImageArrays, ImageError, ImageFiles, batches, images_in_order
from pyreid.data.transforms import MEAN, STD, View, make


def noise(height, width, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def people(count=12, height=16, width=8):
    pixels = np.random.default_rng(1).integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    return ImageArrays(pixels, ids=np.arange(count) // 2, cameras=np.arange(count) % 3)


def same(ours, theirs):
    """Whether two sequences of batches are equal, bit for bit."""
    ours, theirs = list(ours), list(theirs)
    return len(ours) == len(theirs) and all(
        a.skipped == b.skipped
        and all(torch.equal(x, y) for x, y in zip(a.views, b.views, strict=True))
        and all(torch.equal(getattr(a, k), getattr(b, k)) for k in ("rows", "labels", "cameras"))
        for a, b in zip(ours, theirs, strict=True)
    )


def raised(kind, call):
    with pytest.raises(kind) as error:
        call()
    return str(error.value)


# --- Views


def reference(height, width, *before):
    return released.Compose(
        [
            released.Resize((height, width), interpolation=released.InterpolationMode.BICUBIC),
            *before,
            released.ToTensor(),
            released.Normalize(MEAN, STD),
        ]
    )


@pytest.mark.parametrize("name", ["weak", "plain"])
@pytest.mark.parametrize("height, width", [(256, 128), (64, 32), (31, 17)])
@pytest.mark.parametrize("source", [(128, 64), (64, 32), (300, 90)])
def test_resized_and_normalised_as_torchvision_does(name, height, width, source):
    image = noise(*source)
    view = make(name, height, width)(image)
    assert (view.dtype, view.shape, view.is_contiguous()) == (
        torch.float32,
        (3, height, width),
        True,
    )
    assert torch.equal(view, reference(height, width)(image))


def test_normalisation():
    grey = Image.new("RGB", (8, 16), (0, 255, 51))
    black, white, fifth = make("plain", 16, 8)(grey)[:, 3, 3].tolist()
    assert black == pytest.approx(-0.485 / 0.229)
    assert white == pytest.approx((1 - 0.456) / 0.224)
    assert fifth == pytest.approx((0.2 - 0.406) / 0.225)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_other_modes_become_rgb(mode):
    image = noise(16, 8).convert(mode)
    assert torch.equal(make("plain", 16, 8)(image), make("plain", 16, 8)(image.convert("RGB")))


@pytest.mark.parametrize("height, width, down, right", [(256, 128, 10, 10), (64, 64, 2, 5)])
def test_shifts(height, width, down, right):
    """Every view is a window of the padded image, in black beyond its edges; each offset comes up."""
    image = noise(height, width)
    view = View(height, width, pad=10)
    padded = reference(height, width, released.Pad((right, down)))(image)
    windows = {
        padded[:, top : top + height, left : left + width].numpy().tobytes(): (top, left)
        for top in range(2 * down + 1)
        for left in range(2 * right + 1)
    }
    torch.manual_seed(0)
    seen = [windows[view(image).numpy().tobytes()] for _ in range(300)]
    assert {top for top, _ in seen} == set(range(2 * down + 1))
    assert {left for _, left in seen} == set(range(2 * right + 1))


def test_flips():
    image = noise(16, 8)
    straight = reference(16, 8)(image)
    torch.manual_seed(0)
    view = View(16, 8, flip=0.5)
    flipped = 0
    for _ in range(400):
        made = view(image)
        flipped += torch.equal(made, straight.flip(2))
        assert torch.equal(made, straight) or torch.equal(made, straight.flip(2))
    assert 160 < flipped < 240


def test_blur_is_pillows():
    """Half of the views are blurred, at 256 x 128 by 0.1 to 2 pixels."""
    image = noise(256, 128)
    sharp = reference(256, 128)(image)
    rough = [
        reference(256, 128)(image.filter(ImageFilter.GaussianBlur(radius))).std()
        for radius in (0.1, 2)
    ]
    torch.manual_seed(0)
    spread = [View(256, 128, blur=0.5)(image) for _ in range(80)]
    blurred = torch.stack([made.std() for made in spread if not torch.equal(made, sharp)])
    assert 25 < len(blurred) < 55
    assert blurred.max() <= rough[0]
    assert blurred.min() >= rough[1]
    assert blurred.min() < rough[1] + 0.1 * (rough[0] - rough[1])

    torch.manual_seed(5)
    sigma = torch.rand(6).tolist()[4]
    torch.manual_seed(5)
    expected = reference(64, 32)(
        noise(64, 32).filter(ImageFilter.GaussianBlur((0.1 + 1.9 * sigma) / 4))
    )
    assert torch.equal(View(64, 32, blur=1)(noise(64, 32)), expected)


def test_erasing():
    """A rectangle of the released sizes, filled with ImageNet's mean in a view that is normalised already."""
    height, width = 128, 64
    view = View(height, width, erase=0.6)
    black = Image.new("RGB", (width, height))
    plain = make("plain", height, width)(black)
    torch.manual_seed(0)
    shares, aspects, corners = [], [], []
    for _ in range(600):
        made = view(black)
        changed = (made != plain).any(dim=0)
        if not changed.any():
            continue
        rows, columns = changed.any(dim=1).nonzero(), changed.any(dim=0).nonzero()
        top, left = int(rows[0]), int(columns[0])
        high, wide = len(rows), len(columns)
        assert changed[top : top + high, left : left + wide].all()
        assert (high, wide) < (height, width)
        assert torch.equal(made[:, top, left], torch.tensor(MEAN))
        assert changed.sum() == high * wide
        shares.append(high * wide / (height * width))
        aspects.append(high / wide)
        corners.append((top / (height - high), left / (width - wide)))
    assert 320 < len(shares) < 400
    assert 0.015 < min(shares) < 0.04
    assert 0.36 < max(shares) < 0.42
    assert 0.25 < min(aspects) < 0.6
    assert 3 < max(aspects) < 3.6
    assert np.median(aspects) > 1.5  # the aspect is uniform, not its logarithm
    assert np.min(corners) == 0
    assert np.max(corners) == 1


def test_views_by_name():
    assert make("strong", 256, 128) == View(256, 128, pad=10, flip=0.5, blur=0.5, erase=0.6)
    assert make("standard", 256, 128) == View(256, 128, pad=10, flip=0.5, erase=0.5)
    assert make("mirrored", 256, 128) == View(256, 128, flip=0.5)
    assert make("weak", 256, 128) == make("plain", 256, 128) == View(256, 128)
    assert raised(ValueError, lambda: make("stronger", 256, 128)) == (
        "make: name must be one of strong, standard, erased, mirrored, weak, plain, mesh, turned mesh, "
        "turned mesh to 270, got 'stronger'"
    )
    assert raised(ValueError, lambda: make("weak", 0, 128)) == (
        "make: height and width must be positive, got 0 and 128"
    )


@pytest.mark.parametrize("name", ["strong", "standard", "weak"])
@pytest.mark.parametrize("height, width", [(256, 128), (8, 4), (1, 1), (3, 50)])
def test_views_are_finite_at_every_size(name, height, width):
    torch.manual_seed(0)
    for _ in range(20):
        made = make(name, height, width)(noise(40, 20))
        assert made.shape == (3, height, width)
        assert made.isfinite().all()


def test_randomness_is_torchs():
    view = make("strong", 64, 32)
    torch.manual_seed(3)
    first = view(noise(64, 32))
    assert not torch.equal(first, view(noise(64, 32)))
    torch.manual_seed(3)
    assert torch.equal(first, view(noise(64, 32)))
    state = torch.get_rng_state()
    make("plain", 64, 32)(noise(64, 32))
    assert torch.equal(torch.get_rng_state(), state)


# --- Batches

PLAN = [[0, 3, 5, 7], [11, 1, 2, 4], [0, 3, 5, 7]]
VIEWS = [make("strong", 16, 8), make("strong", 16, 8), make("weak", 16, 8)]
LABELS = np.arange(12) // 2 - 1


def three_views(images=None, plan=PLAN, **options):
    options = {"transforms": VIEWS, "labels": LABELS, "seed": 4, **options}
    return batches(people() if images is None else images, plan, **options)


def test_what_is_in_a_batch():
    first, second, third = three_views()
    images = people()
    for batch, rows in zip((first, second, third), PLAN, strict=True):
        assert (len(batch), len(batch.views), batch.skipped) == (4, 3, ())
        assert batch.rows.tolist() == rows
        assert batch.labels.tolist() == LABELS[rows].tolist()
        assert batch.cameras.tolist() == images.cameras[rows].tolist()
        for view in batch.views:
            assert (view.dtype, view.shape) == (torch.float32, (4, 3, 16, 8))
        weak = torch.stack([VIEWS[2](images[row][0]) for row in rows])
        assert torch.equal(batch.views[2], weak)
    assert not torch.equal(first.views[0], first.views[1])
    assert not torch.equal(first.views[0], third.views[0])  # the same rows at another step
    assert torch.equal(first.views[2], third.views[2])
    moved = first.to("cpu")
    assert isinstance(moved, Batch)
    assert same([moved], [first])
    assert first.to("meta").views[0].device.type == "meta"


def test_workers_change_nothing():
    plan = PLAN * 3
    state = torch.get_rng_state()
    expected = list(three_views(plan=plan))
    with_workers = list(three_views(plan=plan, workers=2))
    assert torch.equal(torch.get_rng_state(), state)
    assert same(with_workers, expected)


def test_any_step_can_be_repeated():
    plan = PLAN * 2
    expected = list(three_views(plan=plan))
    for step in range(6):
        assert same(three_views(plan=plan[step:], first_step=step), expected[step:])


def test_shares_of_a_batch_are_the_batch():
    whole = list(three_views())
    shares = [
        list(three_views(plan=[rows[first : first + 2] for rows in PLAN], first_slot=first))
        for first in (0, 2)
    ]
    for batch, *parts in zip(whole, *shares, strict=True):
        for k, view in enumerate(batch.views):
            assert torch.equal(view, torch.cat([part.views[k] for part in parts]))


def test_seed_changes_the_random_views_alone():
    ours, theirs = next(three_views()), next(three_views(seed=5))
    assert not torch.equal(ours.views[0], theirs.views[0])
    assert torch.equal(ours.views[2], theirs.views[2])


def test_a_view_does_not_depend_on_those_before_it():
    others = next(three_views(transforms=[VIEWS[2], *VIEWS[1:]]))
    assert torch.equal(others.views[1], next(three_views()).views[1])


def test_views_of_several_sizes_and_of_anybody():
    halves = next(three_views(transforms=[make("plain", 16, 8), make("plain", 8, 4)]))
    image = people()[0][0]
    assert torch.equal(halves.views[0][0], make("plain", 16, 8)(image))
    assert torch.equal(halves.views[1][0], make("plain", 8, 4)(image))
    (batch,) = three_views(plan=PLAN[:1], transforms=[released.ToTensor(), make("plain", 8, 4)])
    assert torch.equal(batch.views[0][0], released.ToTensor()(image))


def test_endless_plan_is_read_as_it_is_used():
    plan = itertools.cycle([[0, 1]])
    assert len(list(itertools.islice(three_views(plan=plan), 5))) == 5
    some = three_views(plan=plan, workers=1)
    assert same(itertools.islice(some, 2), itertools.islice(three_views(plan=plan), 2))
    some.close()


def test_pinned_memory_is_left_alone_without_workers():
    assert same(three_views(pin_memory=True), three_views())


@pytest.fixture
def files(tmp_path):
    """Twelve files: those of rows 5 and 7 are corrupt."""
    images = people()
    for name, (image, _, _) in zip(images.names, images, strict=True):
        image.save(tmp_path / f"{name}.png")
    for row in (5, 7):
        path = tmp_path / f"{images.names[row]}.png"
        path.write_bytes(path.read_bytes()[:60])
    names = [f"{name}.png" for name in images.names]
    return ImageFiles(tmp_path, names, images.ids, images.cameras)


@pytest.mark.parametrize("workers", [0, 1])
def test_corrupt_image_is_named(files, workers):
    message = raised(ImageError, lambda: list(three_views(files, workers=workers)))
    assert message.startswith(f"{files.root}/000005.png: cannot be read as an image: ")


@pytest.mark.parametrize("workers", [0, 1])
def test_corrupt_image_is_replaced(files, workers):
    plan = [[4, 5, 7, 0], [0, 7, 5, 1], [2, 3, 0, 1]]
    first, second, third = three_views(files, plan, skip_corrupt=True, workers=workers)
    assert first.skipped == ("000005.png", "000007.png")
    assert first.rows.tolist()[:2] == [4, 4]  # of the same label
    assert first.rows.tolist()[2] in (0, 4)
    assert first.rows.tolist()[3] == 0
    assert first.labels.tolist() == LABELS[first.rows].tolist()
    assert first.cameras.tolist() == files.cameras[first.rows].tolist()
    assert torch.equal(first.views[2][0], first.views[2][1])
    assert not torch.equal(first.views[0][0], first.views[0][1])
    assert second.skipped == ("000007.png", "000005.png")
    assert third.skipped == ()
    assert same([third], list(three_views(plan=plan))[2:])


def test_batch_of_corrupt_images(files):
    message = raised(ImageError, lambda: list(three_views(files, [[5, 7]], skip_corrupt=True)))
    assert message.startswith(f"{files.root}/000005.png: ")


class Failing:
    def __call__(self, image):
        raise ZeroDivisionError("by zero")


class Dying:
    def __call__(self, image):
        os._exit(3)


@pytest.mark.parametrize("workers", [0, 1])
def test_failing_transform_names_the_image(workers):
    views = [VIEWS[0], Failing()]
    message = raised(
        RuntimeError,
        lambda: next(three_views(transforms=views, workers=workers, skip_corrupt=True)),
    )
    assert message == "batches: transform 1 failed on 000000: ZeroDivisionError: by zero"


def test_dying_worker_is_an_error():
    message = raised(RuntimeError, lambda: next(three_views(transforms=[Dying()], workers=1)))
    assert "exited unexpectedly" in message


def test_global_state_is_restored_after_an_error():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="transform 0"):
        next(three_views(transforms=[Failing()]))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("rows", [[12], [-1], []])
def test_rows_that_are_not_there(rows, workers):
    message = raised(IndexError, lambda: list(three_views(plan=[[0], rows], workers=workers)))
    assert message == (
        f"batches: step 1 of the plan must be rows of 12 images, got {np.array(rows, np.int64)}"
    )


@pytest.mark.parametrize(
    "options, message",
    [
        ({"labels": [0, 1]}, "batches: labels must have shape (12,), got (2,)"),
        ({"transforms": []}, "batches: transforms must be at least one, got none"),
        ({"seed": -1}, "batches: seed must not be negative, got -1"),
    ],
)
def test_errors_come_at_once(options, message):
    assert raised(ValueError, lambda: three_views(**options)) == message


@pytest.mark.parametrize("batch_size, workers", [(1, 0), (5, 0), (5, 2), (7, 0), (100, 0)])
def test_images_in_order(batch_size, workers):
    images = people().select([3, 1, 2, 0, 11, 5, 6])
    view = make("plain", 16, 8)
    parts = list(images_in_order(images, transform=view, batch_size=batch_size, workers=workers))
    assert {len(part) for part in parts[:-1]} <= {batch_size}
    assert torch.equal(torch.cat(parts), torch.stack([view(image) for image, _, _ in images]))


def test_no_images_in_order():
    none = people().select([])
    assert list(images_in_order(none, transform=make("plain", 16, 8), batch_size=4)) == []


def test_batch_is_a_value():
    batch = next(three_views())
    with pytest.raises(dataclasses.FrozenInstanceError):
        batch.rows = None
