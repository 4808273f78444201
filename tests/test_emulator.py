"""The emulator that runs CUDA kernels on the CPU: right results, every fault found and named."""

import functools
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "tests" / "emulator"
FLAGS = "-std=c++17 -O1 -g1 -Wall -Wextra -ffp-contract=off -pthread -DPYREID_EMULATED"
SANITIZE = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer"
SCHEDULES = {"in_order": 0, "reversed": 1, "shuffled": 2}
COMPILER = os.environ.get("CXX", "g++").split()

# Name -> line at fault: the line marked "here" in the kernel that plants it.
PLANTED = (SOURCES / "faults.cu").read_text()
FAULTS = {
    kernel[1]: PLANTED[: kernel.start(2)].count("\n") + 1
    for kernel in re.finditer(r"(?ms)^FAULT\((\w+).*?(// here)$", PLANTED)
}

pytestmark = pytest.mark.skipif(shutil.which(COMPILER[0]) is None, reason="no C++ compiler")


def compile_program(source, output, *flags):
    command = [*COMPILER, *FLAGS.split(), *flags, f"-I{ROOT / 'csrc'}", "-x", "c++", source]
    return subprocess.run([*command, "-o", output], capture_output=True, text=True)


@pytest.fixture(scope="session")
def program(tmp_path_factory):
    """program("faults", sanitize=True) is tests/emulator/faults.cu, compiled when first asked."""
    folder = tmp_path_factory.mktemp("emulator")

    @functools.cache
    def why_not_sanitized():
        (folder / "empty.cpp").write_text("int main() { return 0; }\n")
        made = compile_program(folder / "empty.cpp", folder / "empty", *SANITIZE.split())
        if made.returncode == 0:
            made = run(folder / "empty")
        return "" if made.returncode == 0 else made.stderr.strip() or f"exit {made.returncode}"

    @functools.cache
    def build(name, sanitize):
        output = folder / (name + "_sanitized" * sanitize)
        made = compile_program(SOURCES / f"{name}.cu", output, *SANITIZE.split() * sanitize)
        assert made.returncode == 0, made.stderr
        return output

    def get(name, sanitize=False):
        if sanitize and why_not_sanitized():
            pytest.skip(f"AddressSanitizer cannot be used here: {why_not_sanitized()}")
        return build(name, sanitize)

    return get


def run(program, *arguments):
    command = [program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("sanitize", [False, True], ids=["plain", "sanitized"])
def test_correct_kernels(program, sanitize):
    result = run(program("correct", sanitize))
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout == "all as expected\n"


@pytest.mark.parametrize("sanitize", [False, True], ids=["plain", "sanitized"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_found_and_named(program, fault, schedule, sanitize):
    result = run(program("faults", sanitize), fault, SCHEDULES[schedule])
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.match(r"planted: block [01], thread \d+ at \S+faults\.cu:\d+: ", result.stdout)
    assert re.search(rf"faults\.cu:{FAULTS[fault]}\b", result.stdout), result.stdout


@pytest.mark.parametrize("sanitize", [False, True], ids=["plain", "sanitized"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_nothing_is_lost_after_faults(program, schedule, sanitize):
    result = run(program("faults", sanitize), "recovery", SCHEDULES[schedule])
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_sanitizer_finds_global_access_beyond_the_array(program, schedule):
    result = run(program("faults", sanitize=True), "global_beyond", SCHEDULES[schedule])
    assert result.returncode != 0
    assert "heap-buffer-overflow" in result.stderr
    assert "global_beyond_kernel" in result.stderr
    assert "160-byte region" in result.stderr


def test_all_planted_faults_are_tested():
    assert len(FAULTS) == PLANTED.count("\nFAULT(")
