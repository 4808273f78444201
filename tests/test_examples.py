"""The examples run, and learn something."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(command):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
        cwd=EXAMPLES.parent,
    )
    assert done.returncode == 0, done.stderr
    return [float(found) for found in re.findall(r"mAP ([\d.]+)%", done.stdout)]


@pytest.mark.parametrize("example", ["plain_loop", "jax_head"])
def test_learns(example):
    untrained, trained = run([EXAMPLES / f"{example}.py"])
    assert trained > 1.3 * untrained


FEW = ("--ids", "24", "--epochs", "2", "--steps", "3")


@pytest.mark.parametrize("example", ["lightning_loop", "accelerate_loop"])
def test_runs(example):
    untrained, trained = run([EXAMPLES / f"{example}.py", *FEW])
    assert trained != untrained


def test_accelerate_on_two_processes():
    launch = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2")
    assert len(run([*launch, EXAMPLES / "accelerate_loop.py", "--cpu", *FEW])) == 2


def test_every_example_is_here():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {
        *("plain_loop", "jax_head", "lightning_loop", "accelerate_loop")
    }
