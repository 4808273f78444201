"""`pyreid demo`: a memory bank at work on made-up features, in a few seconds on any CPU."""

from __future__ import annotations

import time

import torch

from pyreid import ops

PEOPLE, CAMERAS, DIM, BATCH, EPOCHS, MOMENTUM = 500, 6, 1024, 256, 6, 0.9


def main() -> int:
    generator = torch.Generator().manual_seed(0)
    people = torch.randn(PEOPLE, DIM, generator=generator)
    cameras = torch.randn(CAMERAS, DIM, generator=generator)

    def photograph(ids, camera):
        """Features of people as cameras see them: identity, the camera's cast, and noise."""
        noise = torch.randn(len(ids), DIM, generator=generator)
        return torch.nn.functional.normalize(people[ids] + 1.5 * cameras[camera] + 4 * noise)

    everyone = torch.arange(PEOPLE)
    bank = photograph(everyone, torch.zeros_like(everyone))
    seen_elsewhere = everyone.repeat_interleave(CAMERAS - 1)
    probes = photograph(seen_elsewhere, everyone.repeat(CAMERAS - 1) % (CAMERAS - 1) + 1)

    def rank1():
        found = (probes @ bank.T).argmax(dim=1)
        return (found == seen_elsewhere).float().mean().item()

    print(
        f"{PEOPLE} made-up people, {CAMERAS} cameras, {DIM} features; one image each in the bank."
    )
    print("Each epoch shows everyone twice in every camera, and the bank takes the images in:")
    print("\nepoch   rank-1   memory_update_   Python loop")
    print(f"{0:5}   {rank1():6.1%}")
    for epoch in range(1, EPOCHS + 1):
        shown = torch.randperm(2 * PEOPLE * CAMERAS, generator=generator)
        ours = loops = 0.0
        for batch in shown.split(BATCH):
            ids, camera = batch % PEOPLE, batch // PEOPLE % CAMERAS
            features = photograph(ids, camera)
            expected = bank.clone()
            start = time.perf_counter()
            update_in_a_loop(expected, features, ids)
            loops += time.perf_counter() - start
            start = time.perf_counter()
            ops.memory_update_(bank, features, ids, momentum=MOMENTUM)
            ours += time.perf_counter() - start
            torch.testing.assert_close(bank, expected, rtol=0, atol=1e-6)
        print(f"{epoch:5}   {rank1():6.1%}   {ours * 1e3:11.1f} ms   {loops * 1e3:8.1f} ms")
    print(
        "\nThe two agree to 1e-6 in every batch. Next: `make bench`, or README.md for your own trainer."
    )
    return 0


def update_in_a_loop(bank: torch.Tensor, features: torch.Tensor, rows: torch.Tensor) -> None:
    """What trainers do today."""
    for feature, row in zip(features, rows, strict=True):
        bank[row] = MOMENTUM * bank[row] + (1 - MOMENTUM) * feature
        bank[row] /= bank[row].norm()
