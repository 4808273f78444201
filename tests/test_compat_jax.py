"""`pyreid.compat.jax`, by the tests in jax_cases.py: in a process of their own, because JAX starts threads,
after which no test may fork."""

import subprocess
import sys
from pathlib import Path


def test_in_a_process_of_its_own():
    cases = Path(__file__).with_name("jax_cases.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", cases]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
