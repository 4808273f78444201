"""A step of SCL without its network: selection, loss, backward, the updates of three banks.

The released way has the banks for ranking in the host's memory, sorts all distances, and makes the logits of
each of its sixteen terms anew.
"""

import importlib.util

import torch
from torch.nn import functional as F

from .timing import Case, pytest_benchmark

PARTS = (2048, *[256] * 8)
SIZES = {"Market-1501": (12_936, 6), "MSMT17": (32_621, 15)}


def cases(device, quick=False):
    if importlib.util.find_spec("PIL") is None:  # nor is the training layer here
        return
    if quick:
        yield case(device, "3,000 images", 3000, 6, batch=8)
        return
    yield case(device, "Market-1501", *SIZES["Market-1501"], batch=8)
    yield case(device, "Market-1501", *SIZES["Market-1501"], batch=64)
    if device != "cpu":
        yield case(device, "MSMT17", *SIZES["MSMT17"], batch=64)


class Given(torch.nn.Module):
    """In place of the network: what it would have made."""

    parts = PARTS

    def forward(self, features):
        return features


def case(device, name, size, cameras, *, batch):
    from pyreid.data import Batch
    from pyreid.methods.scl import SCL, Config, unit_parts

    def make():
        """Features that lie close to those of their people, as after some epochs."""
        generator = torch.Generator().manual_seed(0)
        people = torch.randn(size // 17, sum(PARTS), generator=generator)
        ids = torch.arange(size) % len(people)
        bank = people[ids]
        for first in range(0, size, 1024):  # a panel of noise at a time
            panel = bank[first : first + 1024]
            panel += torch.randn(panel.shape, generator=generator)
            panel.copy_(unit_parts(panel, PARTS))
        mixture = bank[:, :2048].clone()
        rows = torch.randperm(size, generator=generator)[:batch]
        features = unit_parts(
            people[ids[rows]] + torch.randn(batch, sum(PARTS), generator=generator), PARTS
        )
        seen_by = torch.arange(size) % cameras
        return {
            "bank": bank.to(device),
            "mixture": mixture.to(device),
            "rows": rows.to(device),
            "features": features.to(device),
            "cameras": seen_by.to(device),
        }

    def ours(state):
        if "method" not in state:
            method = SCL(Given(), Config(initial_epochs=0))
            method.epoch = 1
            method.bank, method.mixture = state["bank"], state["mixture"]
            method.cameras = state["cameras"]
            state["method"] = method
        method, rows, cameras = state["method"], state["rows"], state["cameras"]
        features = state["features"].detach().requires_grad_()
        given = Batch((features,), rows, rows, cameras[rows])
        losses = method.loss(given)
        loss = losses["local"] + losses["global"]
        loss.backward()
        method.update(given)
        return loss.detach(), features.grad, method.bank[rows], method.mixture[rows]

    def released(state):
        """Banks for ranking on the host, that for the loss on the device, as released."""
        if "host" not in state:
            parts = state["bank"].cpu().split(PARTS, dim=1)
            state["host"] = parts[0].clone(), torch.stack(parts[1:])
        whole, stripes = state["host"]
        rows, mixture = state["rows"].cpu(), state["mixture"]
        cameras = state["cameras"].cpu()
        features = state["features"].detach().requires_grad_()
        units = [F.normalize(part) for part in features.split(PARTS, dim=1)]
        query = units[0], torch.cat(units[1:], dim=1)
        g, local = units[0].detach().cpu(), torch.stack(units[1:]).detach().cpu()

        distance = 0.5 * (2 - 2 * g @ whole.T)
        for s in range(8):
            distance += 0.5 / 8 * (2 - 2 * local[s] @ stripes[s].T)
        mask = torch.zeros(len(rows), len(cameras), dtype=torch.float64)
        for i, row in enumerate(rows):
            mask[i] = cameras == cameras[row]
        ranking = (distance + 0.05 * mask).argsort(dim=1)
        listed = torch.stack(
            [torch.cat([row[None], r[r != row]]) for row, r in zip(rows, ranking, strict=True)]
        )[:, :508].to(mixture.device)

        total = 0.0
        for branch in (1, 0):
            for j in range(8):
                logits = torch.stack(
                    [10 * mixture[own] @ q for own, q in zip(listed, query[branch], strict=True)]
                )
                target = torch.full((len(rows),), j, device=mixture.device)
                weight = 0.5 if j == 0 else 1.75 * 0.5 / 7
                total = total + 0.5 * weight * F.cross_entropy(logits, target)
        total.backward()
        for branch in (1, 0):
            for j in reversed(range(8)):
                for q, row in zip(query[branch].detach(), listed[:, j], strict=True):
                    mixture[row] = F.normalize((mixture[row] + q) / 2, dim=0)
        whole[rows] = F.normalize(0.5 * whole[rows] + 0.5 * g)
        stripes[:, rows] = F.normalize(0.5 * stripes[:, rows] + 0.5 * local, dim=2)
        moved = torch.cat([whole[rows], *stripes[:, rows]], dim=1).to(mixture.device)
        return total.detach(), features.grad, moved, mixture[state["rows"]]

    dim = sum(PARTS)
    return Case(
        op="SCL step",
        size=f"N={size} B={batch} D={dim} ({name}, no network)",
        device=device,
        make=make,
        ours=ours,
        baselines={"released way": released},
        bytes=4 * (size * dim + batch * 508 * 2048),
        flops=2 * batch * size * dim,
        tolerance=1e-4,
    )


def test_speed(case, contender, benchmark):
    pytest_benchmark(case, contender, benchmark)
