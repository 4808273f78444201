"""Compiles every kernel for all architectures of a wheel and reports what each takes.

Fails where a kernel spills registers or keeps a stack frame: both mean slow local memory, and are
nearly always a mistake that no test shows.

    python build_tools/resources.py
"""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import native
import toolkit

FOLDER = Path("build/resources")

_KERNEL = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\w+)'")
_MEMORY = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


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


def compile_one(source: Path, plan: toolkit.Plan, env) -> tuple[list[Kernel], int]:
    """The kernels of one file, and the bytes of its compressed fat binary."""
    target = FOLDER / f"{source.stem}.o"
    command = [
        str(plan.nvcc.path),
        *native.NVCC_FLAGS,
        *plan.architectures.flags(),
        *("-Xptxas", "-v", "-c", str(source), "-o", str(target)),
    ]
    done = subprocess.run(command, cwd=toolkit.ROOT, env=env, capture_output=True, text=True)
    if done.returncode != 0:
        raise toolkit.ToolkitError(f"{source} failed to compile:\n{done.stdout}{done.stderr}")
    return parse(done.stdout + done.stderr, source.stem), fat_binary_bytes(target)


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


def table(kernels: list[Kernel]) -> str:
    """A line per kernel: its shared memory, and its registers on each architecture."""
    names = demangled(sorted({kernel.name for kernel in kernels}))
    architectures = toolkit.ordered(kernel.architecture for kernel in kernels)
    lines = [f"{'shared':>7}" + "".join(f"{'sm_' + name:>8}" for name in architectures)]
    rows: dict[tuple[str, str], dict[str, Kernel]] = {}
    for kernel in kernels:
        rows.setdefault((kernel.file, names[kernel.name]), {})[kernel.architecture] = kernel
    for (file, name), row in sorted(rows.items()):
        shared = max(kernel.shared for kernel in row.values())
        cells = [
            f"{row[sm].registers}{'!' if row[sm].is_bad else ''}" if sm in row else ""
            for sm in architectures
        ]
        lines.append(f"{shared:>7}" + "".join(f"{c:>8}" for c in cells) + f"  {file}: {name}")
        lines += [
            f"        ! sm_{sm}: {kernel.stack} bytes of stack, {kernel.spills} of spills"
            for sm, kernel in row.items()
            if kernel.is_bad
        ]
    return "\n".join(lines)


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

    kernels = [kernel for found, _ in results for kernel in found]
    print("Shared memory in bytes; registers per thread, by architecture\n")
    print(table(kernels))
    print(f"\nCompressed fat binary, nvcc {plan.nvcc.release}:")
    for source, (_, size) in zip(sources, results, strict=True):
        print(f"  {source.stem:24}{size / 1024:9.1f} KiB")
    print(f"  {'all':24}{sum(size for _, size in results) / 1024:9.1f} KiB")
    bad = [kernel for kernel in kernels if kernel.is_bad]
    if bad:
        print(f"\n{len(bad)} of {len(kernels)} kernels spill registers or keep a stack frame.")
    return 1 if bad else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except toolkit.ToolkitError as failure:
        sys.exit(f"pyreid: {failure}")
