"""Whole losses of the papers, forward and backward, against the loops of their released code."""

import torch
from torch.nn import functional as F

from pyreid import losses

from .timing import Case, pytest_benchmark


def cases(device, quick=False):
    yield ice(device, batch=32, proxies=4000)
    if not quick:
        yield ice(device, batch=128, proxies=4000)


def gradient(loss, features):
    features = features.detach().requires_grad_()
    value = loss(features)
    value.backward()
    return value.detach(), features.grad


def ice(device, *, batch, proxies, dim=2048, cameras=6):
    """ICE's camera-aware loss, selection included: M proxies, about six a label."""

    def make():
        generator = torch.Generator().manual_seed(0)
        bank = F.normalize(torch.randn(proxies, dim, generator=generator))
        labels = torch.arange(proxies) // 6
        features = torch.randn(batch, dim, generator=generator)
        targets = torch.randint(0, proxies // 6, (batch,), generator=generator)
        seen_by = torch.arange(batch) % cameras
        tensors = [x.to(device) for x in (bank, labels, features, targets, seen_by)]
        return *tensors, losses.CameraProxyContrast(tensors[0], tensors[1])

    def ours(state):
        _, _, features, targets, seen_by, contrast = state
        return gradient(lambda x: contrast(x, targets, seen_by), features)

    def camera_loss(similarities, labels, targets):
        """Of the images of one camera, one after another."""
        part = 0.0
        for similarity, target in zip(similarities, targets, strict=True):
            positive = torch.nonzero(labels == target)[:, 0]
            masked = similarity.detach().clone()
            masked[positive] = -10000.0
            hardest = torch.sort(masked).indices[-50:]
            logits = torch.cat([similarity[positive], similarity[hardest]]) / 0.07
            part = part - F.log_softmax(logits, dim=0)[: len(positive)].mean()
        return 0.5 * part / len(targets)

    def loop(state):
        """As released: the product, too, is taken camera by camera."""
        bank, labels, features, targets, seen_by, _ = state

        def loss(x):
            total = 0.0
            for camera in seen_by.unique():
                members = torch.nonzero(seen_by == camera)[:, 0]
                similarities = F.normalize(x[members]) @ bank.T
                total = total + camera_loss(similarities, labels, targets[members])
            return total

        return gradient(loss, features)

    def one_product(state):
        """With one product for the batch, which the released code could have had."""
        bank, labels, features, targets, seen_by, _ = state

        def loss(x):
            similarities = F.normalize(x) @ bank.T
            total = 0.0
            for camera in seen_by.unique():
                members = torch.nonzero(seen_by == camera)[:, 0]
                total = total + camera_loss(similarities[members], labels, targets[members])
            return total

        return gradient(loss, features)

    return Case(
        op="ICE camera loss",
        size=f"B={batch} M={proxies} D={dim} (mining, forward, backward)",
        device=device,
        make=make,
        ours=ours,
        baselines={"loop per sample": loop, "its product once": one_product},
        bytes=4 * dim * (proxies + 2 * batch),
        flops=2 * batch * proxies * dim,
    )


def test_speed(case, contender, benchmark):
    pytest_benchmark(case, contender, benchmark)
