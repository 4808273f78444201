"""Compiles the native modules: writes build/native/build.ninja and runs ninja.

    _cpu        csrc/bind + csrc/cpu
    _cpu_v3     the same, for x86-64 with AVX2; _cpu_v4 for AVX-512. Python chooses at run time
    _cuda       csrc/bind + csrc/cuda, where there is nvcc
    _emulated   csrc/bind + csrc/cuda compiled by the C++ compiler, if PYREID_EMULATED=1: for tests

csrc/bind is compiled once and linked into all of them, except module.cpp, which holds their names.
"""

import contextlib
import fcntl
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from toolkit import ROOT, Nvcc, Plan, ToolkitError, flag, library_folders

FOLDER = Path("build/native")  # relative to ROOT, so that moving the tree rebuilds nothing
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")

# -ffp-contract=off: the same bits on every variant of the CPU floor. -fno-trapping-math changes none: it
# lets g++ compute both sides of a choice, without which loops over float16 are not vector code.
CXX_FLAGS = shlex.split(
    "-O3 -std=c++17 -fPIC -fvisibility=hidden -fvisibility-inlines-hidden -ffp-contract=off "
    "-fno-trapping-math -pthread -Wall -Wextra -Icsrc"
)
# --exclude-libs: the static CUDA runtime must not meet another one that torch has loaded.
LINK_FLAGS = shlex.split("-shared -pthread -Wl,-s -Wl,--exclude-libs,ALL")
CUDA_LIBRARIES = shlex.split("-lcudart_static -ldl -lrt -lpthread")
NVCC_FLAGS = [
    *shlex.split("-O3 -std=c++17 -cudart static -Icsrc"),
    "-Xcompiler=-fPIC,-fvisibility=hidden",
    "-Xfatbin=-compress-all",
]
NVCC_BYTES = 2 << 30  # what one nvcc process may take


class Module(NamedTuple):
    name: str
    objects: list[str]  # besides those of csrc/bind
    libraries: list[str]


def build(plan: Plan, env: Mapping[str, str]) -> dict[str, Path]:
    """Builds all modules that `plan` allows; returns their files by name."""
    if sys.platform != "linux":
        raise ToolkitError(f"pyreid builds on Linux only, and this is {sys.platform}.")
    folder = ROOT / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / ".lock"):
        script, modules = describe(plan, env)
        (folder / "build.ninja").write_text(script)
        jobs = job_count(env)
        # In the environment, not in the command: another number of jobs is no reason to rebuild.
        per_file = max(1, jobs // max(1, len(sources("cuda", ".cu"))))
        threads = f"{env.get('NVCC_APPEND_FLAGS', '')} --threads={per_file}".strip()
        command = [*ninja(), "-f", str(FOLDER / "build.ninja"), f"-j{jobs}"]
        done = subprocess.run(command, cwd=ROOT, env={**env, "NVCC_APPEND_FLAGS": threads})
    if done.returncode != 0:
        raise ToolkitError(
            "the native modules failed to compile; the compiler's message stands above. If it is "
            "nvcc's: another toolkit can be chosen with CUDA_HOME, another host compiler with CXX; "
            "PYREID_NO_CUDA=1 builds without CUDA."
        )
    return {module: ROOT / file for module, file in modules.items()}


def describe(plan: Plan, env: Mapping[str, str]) -> tuple[str, dict[str, Path]]:
    """The text of build.ninja, and the file of each module."""
    cxx = shlex.split(compiler(env))
    flags = [*cxx, *CXX_FLAGS, *shlex.split(env.get("CXXFLAGS", ""))]
    link = [*cxx, *LINK_FLAGS]
    ninja_file = NinjaFile()
    ninja_file.rule("cxx", [*flags, "$extra", "-MMD", "-MF", "$out.d", "-c", "$in", "-o", "$out"])
    ninja_file.rule(
        "link", [*link, "$in", "-o", "$out", "$extra", *shlex.split(env.get("LDFLAGS", ""))]
    )

    python = FOLDER / sys.implementation.cache_tag
    bind_flags = [f"-isystem{folder}" for folder in bind_includes()]
    bind = [
        ninja_file.compile("cxx", source, python, bind_flags)
        for source in sources("bind", ".cpp")
        if source.name != "module.cpp"
    ]
    files = {}
    for module in modules(plan, env, ninja_file):
        named = [*bind_flags, f"-DPYREID_MODULE={module.name}"]
        entry = ninja_file.compile("cxx", Path("csrc/bind/module.cpp"), python / module.name, named)
        files[module.name] = python / f"{module.name}{SUFFIX}"
        objects = [*bind, entry, *module.objects]
        ninja_file.edge("link", files[module.name], objects, module.libraries)
    return ninja_file.text(), files


def modules(plan: Plan, env: Mapping[str, str], ninja_file: "NinjaFile"):
    for name, flags in cpu_variants(env).items():
        objects = [
            ninja_file.compile("cxx", source, FOLDER / name, flags)
            for source in sources("cpu", ".cpp")
        ]
        yield Module(name, objects, [])
    if plan.nvcc is not None:
        ninja_file.rule("nvcc", nvcc_command(plan, env))
        objects = [
            ninja_file.compile("nvcc", source, FOLDER / "_cuda")
            for source in sources("cuda", ".cu")
        ]
        folders = [f"-L{folder}" for folder in library_folders(at_steady_path(plan.nvcc))]
        yield Module("_cuda", objects, [*folders, *CUDA_LIBRARIES])
    if flag(env, "PYREID_EMULATED"):
        objects = [
            ninja_file.compile(
                "cxx",
                source,
                FOLDER / "_emulated",
                shlex.split("-x c++ -DPYREID_EMULATED -Wno-unknown-pragmas"),
            )
            for source in sources("cuda", ".cu")
        ]
        yield Module("_emulated", objects, [])


def sources(room: str, ending: str) -> list[Path]:
    return sorted(path.relative_to(ROOT) for path in (ROOT / "csrc" / room).glob(f"*{ending}"))


# --- compilers ------------------------------------------------------------------------------------


def compiler(env: Mapping[str, str]) -> str:
    command = env.get("CXX") or "g++"
    if shutil.which(shlex.split(command)[0], path=env.get("PATH")) is None:
        raise ToolkitError(
            f"there is no C++ compiler {command!r}. Install g++ (Debian, Ubuntu: apt install g++), "
            "or name another in CXX."
        )
    return command


def compiler_release(env: Mapping[str, str]) -> str:
    command = [*shlex.split(compiler(env)), "--version"]
    return subprocess.run(command, capture_output=True, text=True).stdout.partition("\n")[0].strip()


def cpu_variants(env: Mapping[str, str]) -> dict[str, list[str]]:
    """The modules of the CPU floor, each with the flags that set its instructions."""
    variants: dict[str, list[str]] = {"_cpu": []}
    if platform.machine() == "x86_64":
        levels = {"_cpu_v3": "-march=x86-64-v3", "_cpu_v4": "-march=x86-64-v4"}
        variants |= {name: [level] for name, level in levels.items() if compiles(env, level)}
    return variants


def compiles(env: Mapping[str, str], option: str) -> bool:
    """Does the compiler know `option`? g++ before 11 has no x86-64 levels."""
    command = [*shlex.split(compiler(env)), option, "-E", "-x", "c++", os.devnull]
    return subprocess.run(command, capture_output=True).returncode == 0


def nvcc_command(plan: Plan, env: Mapping[str, str]) -> list[str]:
    host = ["-ccbin", env["CXX"]] if env.get("CXX") else []
    nvcc = [str(at_steady_path(plan.nvcc).path), *NVCC_FLAGS, *host, *plan.architectures.flags()]
    # The toolkit's own headers are dropped from the dependencies: an isolated build installs them
    # anew each time, and its version is part of the command anyhow.
    forget = f"&& sed -i -E '\\#^ +(/|{FOLDER}/)#d' $out.d"
    return [*nvcc, "$extra", "-MMD", "-MF", "$out.d", "-c", "$in", "-o", "$out", Raw(forget)]


def at_steady_path(nvcc: Nvcc) -> Nvcc:
    """`nvcc` through a link that is named alike in every isolated build."""
    if nvcc.source != "PyPI":
        return nvcc
    home = steady_link(f"cuda-{nvcc.release}", nvcc.home)
    return nvcc._replace(path=home / "bin" / "nvcc", home=home)


def bind_includes() -> list[str]:
    if importlib.util.find_spec("pybind11") is None:
        raise ToolkitError(
            "the package pybind11 is missing. Build with isolation (plain pip install .), or run: "
            "pip install pybind11 ninja"
        )
    import pybind11

    headers = steady_link(f"pybind11-{pybind11.__version__}", Path(pybind11.get_include()))
    python = {sysconfig.get_path("include"), sysconfig.get_path("platinclude")}
    return [str(headers), *sorted(python)]


def steady_link(name: str, target: Path) -> Path:
    link = FOLDER / name
    (ROOT / link).unlink(missing_ok=True)
    (ROOT / link).symlink_to(target)
    return link


def ninja() -> list[str]:
    if importlib.util.find_spec("ninja") is not None:
        return [sys.executable, "-m", "ninja"]
    found = shutil.which("ninja")
    if found is None:
        raise ToolkitError(
            "ninja is missing. Build with isolation (plain pip install .), or run: "
            "pip install pybind11 ninja"
        )
    return [found]


def job_count(env: Mapping[str, str]) -> int:
    """MAX_JOBS, else one per usable core, as far as memory goes."""
    text = env.get("MAX_JOBS", "").strip()
    if text:
        if not text.isdecimal() or int(text) < 1:
            raise ToolkitError(f"MAX_JOBS must be a number from 1 up, got {text!r}.")
        return int(text)
    return max(1, min(len(os.sched_getaffinity(0)), free_memory() // NVCC_BYTES))


def free_memory() -> int:
    """Bytes to be had, by the machine and by the container's limit."""
    available = re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())
    limits = [int(available[1]) << 10] if available else []
    with contextlib.suppress(OSError, ValueError):
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(limits, default=NVCC_BYTES)


@contextlib.contextmanager
def locked(path: Path):
    """One build at a time in this tree."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


# --- ninja ----------------------------------------------------------------------------------------


class Raw(str):
    """A part of a command that the shell is to read as it stands."""


class NinjaFile:
    """The rules and edges of one build.ninja."""

    def __init__(self) -> None:
        self._lines = ["ninja_required_version = 1.5", f"builddir = {FOLDER}", ""]

    def rule(self, name: str, command: list[str]) -> None:
        self._lines += [
            f"rule {name}",
            f"  command = {shell(command)}",
            f"  description = {name} $out",
        ]
        if name != "link":
            self._lines += ["  depfile = $out.d", "  deps = gcc"]
        self._lines.append("")

    def compile(self, rule: str, source: Path, folder: Path, extra=()) -> str:
        target = folder / f"{source.parent.name}_{source.stem}.o"
        self.edge(rule, target, [str(source)], extra)
        return str(target)

    def edge(self, rule: str, target: Path, inputs: list[str], extra: list[str]) -> None:
        self._lines += [f"build {target}: {rule} {' '.join(inputs)}", f"  extra = {shell(extra)}"]

    def text(self) -> str:
        return "\n".join(self._lines) + "\n"


def shell(words: list[str]) -> str:
    """`words` as one shell command in ninja's spelling; ninja's own $in, $out, $extra stay."""
    own = re.compile(r"\$(in|out|extra)(\.d)?")
    return " ".join(
        word
        if isinstance(word, Raw) or own.fullmatch(word)
        else shlex.quote(word).replace("$", "$$")
        for word in words
    )
