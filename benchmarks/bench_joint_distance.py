"""time_histogram and joint_distance at the sizes of JVTC: every fifth epoch, of all training images."""

import math

import torch

from pyreid import ops

from .timing import Case, pytest_benchmark

SPAN = 200_000  # frames


def cases(device, quick=False):
    yield histogram(device, 12936, 6, 700, "Market-1501")
    yield distance(
        device, 2000 if quick else 12936, 512, 6, "part of it" if quick else "Market-1501"
    )
    if not quick:
        yield histogram(device, 32621, 15, 1041, "MSMT17")
        yield distance(device, 3368, 512, 6, "test time: 15,913 in the gallery", gallery=15913)


def sightings(size, cameras, classes, dim, device):
    generator = torch.Generator().manual_seed(0)

    def drawn(most):
        return torch.randint(0, most, (size,), generator=generator).to(device)

    features = torch.nn.functional.normalize(torch.randn(size, dim, generator=generator))
    return features.to(device), drawn(classes), drawn(cameras), drawn(SPAN)


def histogram(device, size, cameras, classes, what):
    def make():
        return sightings(size, cameras, classes, 1, device)[1:]

    return Case(
        op="time_histogram",
        size=f"N={size} C={cameras} M={classes} ({what})",
        device=device,
        make=make,
        ours=lambda state: ops.time_histogram(*state),
        baselines={"Python loop": loop},
        bytes=24 * size + 4 * cameras**2 * 3000,
    )


def distance(device, size, dim, cameras, what, *, gallery=None):
    def make():
        rows = sightings(gallery or size, cameras, 700, dim, device)
        features, labels, where, when = rows
        beside = {}
        if gallery:
            q, _, query_cameras, query_frames = sightings(size, cameras, 700, dim, device)
            beside = {"queries": q, "query_cameras": query_cameras, "query_frames": query_frames}
        return features, where, when, ops.time_histogram(labels, where, when), beside

    return Case(
        op="joint_distance",
        size=f"N={size} D={dim} C={cameras} ({what})",
        device=device,
        make=make,
        ours=lambda state: ops.joint_distance(*state[:4], **state[4]),
        baselines={"torch, whole matrices": whole},
        bytes=4 * size * (gallery or size),
    )


def loop(state):
    """Cluster by cluster, camera by camera, as released; smoothed by a product with a matrix."""
    labels, cameras, frames = (x.tolist() for x in state)
    count = max(cameras) + 1
    seen = {}
    for label, camera, frame in zip(labels, cameras, frames, strict=True):
        seen.setdefault(label, {}).setdefault(camera, []).append(frame)
    counts = torch.zeros(count, count, 3000, dtype=torch.float64)
    for of in seen.values():
        means = {camera: sum(times) / len(times) for camera, times in of.items()}
        for a in of:
            for frame in of[a]:
                counts[a, a, (frame - min(of[a])) // 100] += len(of[a])
            for b in of:
                time = means[a] - means[b]
                if time > 0 or (time == 0 and a > b):
                    counts[a, b, math.floor(time / 100)] += 1
    apart = (torch.arange(3000)[:, None] - torch.arange(3000)).abs()
    gaussian = torch.exp(-0.5 * (apart / 50.0).double() ** 2) * (apart <= 150)
    smooth = counts @ gaussian
    shares = smooth / smooth.sum(dim=2, keepdim=True).clamp(min=1e-300)
    return shares.float().to(state[0].device)


def whole(state):
    """The formula in torch, which holds a dozen matrices of all pairs on its way."""
    features, cameras, frames, shares, beside = state
    own = beside.get("query_cameras", cameras), beside.get("query_frames", frames)
    looks = beside.get("queries", features) @ features.T
    time = own[1][:, None] - frames
    later = (time > 0) | ((time == 0) & (own[0][:, None] > cameras))
    pair = torch.where(
        later,
        own[0][:, None] * len(shares) + cameras,
        cameras * len(shares) + own[0][:, None],
    )
    place = time.abs() // 100
    inside = place < shares.shape[2]
    found = shares.flatten()[pair * shares.shape[2] + place.clamp(max=shares.shape[2] - 1)] * inside
    return 1 - 1 / (1 + torch.exp(-5 * looks)) / (1 + 2 * torch.exp(-5 * found))


def test_speed(case, contender, benchmark):
    pytest_benchmark(case, contender, benchmark)
