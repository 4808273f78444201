"""Compiles every kernel for all architectures of a wheel and reports what each takes, and how much of a
multiprocessor it can fill.

Fails where a kernel spills registers or keeps a stack frame: both mean slow local memory, and are
nearly always a mistake that no test shows.

    python build_tools/resources.py
"""

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import native
import toolkit
from occupancy import occupancy

FOLDER = Path("build/resources")

_KERNEL = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\w+)'")
_MEMORY = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")
_ENTRY = re.compile(r"\.entry (\w+)\(")
_THREADS = re.compile(r"\.maxntid (\d+)")


class Kernel(NamedTuple):
    file: str
    name: str  # mangled
    architecture: str
    registers: int
    shared: int
    stack: int
    spills: int  # bytes stored and loaded

    @property
    def is_bad(self) -> bool:
        return self.stack > 0 or self.spills > 0


class Launch(NamedTuple):
    threads: int  # of a block, at most: the kernel's launch bounds
    dynamic: bool  # whether a launch asks for shared memory beyond the static


def launches(ptx: str) -> dict[str, Launch]:
    """How the kernels of a file of PTX are launched, by name."""
    names_and_bodies = _ENTRY.split(ptx)[1:]
    return {
        name: Launch(int((_THREADS.search(body) or [0, 0])[1]), "pyreid_dynamic_sharedE;" in body)
        for name, body in zip(names_and_bodies[0::2], names_and_bodies[1::2], strict=True)
    }


def parse(log: str, file: str) -> list[Kernel]:
    """The kernels that `ptxas -v` reports in `log`."""
    kernels = []
    # Each kernel's report runs to the next one's heading; the pieces are (name, sm, report)*.
    pieces = _KERNEL.split(log)[1:]
    for name, architecture, told in zip(pieces[0::3], pieces[1::3], pieces[2::3], strict=True):
        # Functions that were not inlined are reported along with their kernel; all count.
        frames = [[int(number) for number in match] for match in _MEMORY.findall(told)]
        kernels.append(
            Kernel(
                file,
                name,
                architecture,
                registers=int(_REGISTERS.search(told)[1]),
                shared=int((_SHARED.search(told) or [0, 0])[1]),
                stack=max((frame[0] for frame in frames), default=0),
                spills=sum(frame[1] + frame[2] for frame in frames),
            )
        )
    return kernels


class Compiled(NamedTuple):
    kernels: list[Kernel]
    launches: dict[str, Launch]
    fat_binary: int  # bytes, compressed


def compile_one(source: Path, plan: toolkit.Plan, env) -> Compiled:
    target = FOLDER / f"{source.stem}.o"
    kept = toolkit.ROOT / FOLDER / source.stem  # what nvcc makes on its way
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir()
    command = [
        str(plan.nvcc.path),
        *native.NVCC_FLAGS,
        *plan.architectures.flags(),
        *("--keep", "--keep-dir", str(kept)),
        *("-Xptxas", "-v", "-c", str(source), "-o", str(target)),
    ]
    done = subprocess.run(command, cwd=toolkit.ROOT, env=env, capture_output=True, text=True)
    if done.returncode != 0:
        raise toolkit.ToolkitError(f"{source} failed to compile:\n{done.stdout}{done.stderr}")
    found: dict[str, Launch] = {}
    for ptx in kept.glob("*.ptx"):
        found |= launches(ptx.read_text())
    shutil.rmtree(kept)
    return Compiled(parse(done.stdout + done.stderr, source.stem), found, fat_binary_bytes(target))


def fat_binary_bytes(target: Path) -> int:
    listed = subprocess.run(
        ["size", "-A", str(target)], cwd=toolkit.ROOT, capture_output=True, text=True, check=True
    )
    return sum(int(size) for size in re.findall(r"^\.nv_fatbin\s+(\d+)", listed.stdout, re.M))


def demangled(names: list[str]) -> dict[str, str]:
    """Readable names, as far as c++filt is there; without argument lists, which are long."""
    try:
        done = subprocess.run(
            ["c++filt", "-p"], input="\n".join(names), capture_output=True, text=True
        )
    except FileNotFoundError:
        return dict(zip(names, names, strict=True))
    readable = done.stdout.replace("(anonymous namespace)::", "").replace("pyreid::", "")
    short = [re.sub(r"^void ", "", line) for line in readable.split("\n")]
    return dict(zip(names, short, strict=False))


def table(kernels: list[Kernel], found: dict[str, Launch]) -> str:
    """A line per kernel: its block and shared memory; on each architecture its registers and occupancy."""
    names = demangled(sorted({kernel.name for kernel in kernels}))
    architectures = toolkit.ordered(kernel.architecture for kernel in kernels)
    head = f"{'threads':>7}{'shared':>8}"
    lines = [head + "".join(f"{'sm_' + name:>11}" for name in architectures)]
    rows: dict[tuple[str, str], dict[str, Kernel]] = {}
    for kernel in kernels:
        rows.setdefault((kernel.file, names[kernel.name]), {})[kernel.architecture] = kernel
    for (file, name), row in sorted(rows.items()):
        shared = max(kernel.shared for kernel in row.values())
        launch = found[next(iter(row.values())).name]
        cells = [cell(row[sm], launch) if sm in row else "" for sm in architectures]
        told = f"{launch.threads or '?':>7}{shared:>7}{'+' if launch.dynamic else ' '}"
        lines.append(told + "".join(f"{c:>11}" for c in cells) + f"  {file}: {name}")
        lines += [
            f"        ! sm_{sm}: {kernel.stack} bytes of stack, {kernel.spills} of spills"
            for sm, kernel in row.items()
            if kernel.is_bad
        ]
    return "\n".join(lines)


def cell(kernel: Kernel, launch: Launch) -> str:
    mark = "!" if kernel.is_bad else ""
    if not launch.threads:
        return f"{kernel.registers}{mark}"
    full = occupancy(kernel.architecture, kernel.registers, kernel.shared, launch.threads)
    return f"{kernel.registers}{mark} {full.share:4.0%}"


def main() -> int:
    # For all architectures, whatever this machine's driver and settings are.
    env = {**os.environ, "PYREID_WHEEL": "1"}
    for name in ("TORCH_CUDA_ARCH_LIST", "PYREID_NO_CUDA", "NVCC_APPEND_FLAGS"):
        env.pop(name, None)
    plan = toolkit.plan({**env, "FORCE_CUDA": "1"}, None, sys.path)
    print(*plan.notes, sep="\n", end="\n" if plan.notes else "")
    sources = native.sources("cuda", ".cu")
    (toolkit.ROOT / FOLDER).mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(native.job_count(env)) as pool:
        results = list(pool.map(lambda source: compile_one(source, plan, env), sources))

    kernels = [kernel for result in results for kernel in result.kernels]
    print(
        "Threads and bytes of shared memory of a block (+: and what a launch asks for); by architecture,"
    )
    print("registers of a thread, and warps that fit of those that could (theoretical occupancy)\n")
    print(table(kernels, {name: launch for r in results for name, launch in r.launches.items()}))
    print(f"\nCompressed fat binary, nvcc {plan.nvcc.release}:")
    for source, result in zip(sources, results, strict=True):
        print(f"  {source.stem:24}{result.fat_binary / 1024:9.1f} KiB")
    print(f"  {'all':24}{sum(result.fat_binary for result in results) / 1024:9.1f} KiB")
    bad = [kernel for kernel in kernels if kernel.is_bad]
    if bad:
        print(f"\n{len(bad)} of {len(kernels)} kernels spill registers or keep a stack frame.")
    return 1 if bad else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except toolkit.ToolkitError as failure:
        sys.exit(f"pyreid: {failure}")
