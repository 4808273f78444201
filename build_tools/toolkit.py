"""Which CUDA compiler builds pyreid, and for which architectures.

One decision, `plan`, made from the environment, the driver and the compilers at hand. The build
backend, setup.py, resources.py and CI all ask here, so they cannot disagree.

    python build_tools/toolkit.py requirements    # the packages that bring nvcc, where it is needed
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent

# nvcc and what it needs, as packages. CUDA 12 has no such set: its wheels hold ptxas, not nvcc.
PACKAGED_CUDA = (13, 0)
PACKAGES = [
    f"{name}=={PACKAGED_CUDA[0]}.{PACKAGED_CUDA[1]}.*"
    for name in (
        "nvidia-cuda-nvcc",
        "nvidia-nvvm",
        "nvidia-cuda-crt",
        "nvidia-cuda-runtime",
        "nvidia-cuda-cccl",
    )
]
OLDEST_CUDA = (12, 0)

# A wheel runs as machine code on every GPU people have. PTX 80 is for those between: 8.7 and 11.0.
WHEEL_SASS = ("75", "80", "86", "89", "90", "100", "120")
WHEEL_PTX = ("80", "120")

# Built where no GPU is seen, to be run on any from 7.5 up, and quick to compile. sm_80 code runs
# on 8.x, sm_90 on 9.0; the driver compiles PTX 75 for 7.5, and PTX 90 for whatever is newer.
PORTABLE_SASS = ("80", "90")
PORTABLE_PTX = ("75", "90")

ARCHITECTURE_NAMES = {
    "turing": "7.5",
    "ampere": "8.0;8.6",
    "ada": "8.9",
    "hopper": "9.0",
    "blackwell": "10.0;12.0",
}


class ToolkitError(RuntimeError):
    """A build that cannot be what was asked for; the text says what to do."""


class Nvcc(NamedTuple):
    path: Path  # the compiler
    home: Path  # the toolkit it belongs to
    source: str  # "CUDA_HOME", "CUDA_PATH", "PATH" or "PyPI"
    release: str  # "13.0.88"

    @property
    def version(self) -> tuple[int, int]:
        major, minor = self.release.split(".")[:2]
        return int(major), int(minor)


class Architectures(NamedTuple):
    sass: tuple[str, ...]  # machine code: "80", "90a"
    ptx: tuple[str, ...]  # what the driver can compile for newer GPUs

    def flags(self) -> list[str]:
        codes = [(name, f"sm_{name}") for name in self.sass]
        codes += [(name, f"compute_{name}") for name in self.ptx]
        return [f"-gencode=arch=compute_{name},code={code}" for name, code in codes]


class Plan(NamedTuple):
    nvcc: Nvcc | None
    architectures: Architectures | None
    reason: str | None  # why there is no CUDA floor
    notes: tuple[str, ...]  # to be printed


def flag(env: Mapping[str, str], name: str) -> bool:
    return env.get(name, "").strip().lower() not in ("", "0", "no", "off", "false")


def load_driver():
    """The driver here, read by the package's own reader; the package itself cannot be imported."""
    spec = importlib.util.spec_from_file_location("_driver", ROOT / "pyreid" / "_driver.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.query()


# --- finding nvcc -----------------------------------------------------------------------------


def inspect(path: Path, source: str) -> Nvcc | None:
    """The nvcc at `path`, or None if it does not run (a wrapper of a removed toolkit, say)."""
    version = _output([path, "--version"])
    release = re.search(r"release [\d.]+, V([\d.]+)", version or "")
    # nvcc may be a link or a script elsewhere: only nvcc itself knows where its toolkit is.
    home = re.search(r"^#\$ TOP=(.+)$", _output([path, "--dryrun", "-c", "x.cu"]) or "", re.M)
    if release is None or home is None:
        return None
    return Nvcc(path, Path(home[1].strip()).resolve(), source, release[1])


def system_nvcc(env: Mapping[str, str], notes: list[str]) -> Nvcc | None:
    """nvcc of CUDA_HOME (or CUDA_PATH), else of PATH. What is named explicitly must be usable."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if env.get(variable):
            path = Path(env[variable]) / "bin" / "nvcc"
            nvcc = inspect(path, variable)
            unusable = unusable_because(nvcc, path)
            if unusable:
                raise ToolkitError(
                    f"{variable} is {env[variable]!r}, but {unusable}. Set it to the folder of a "
                    "CUDA toolkit, or unset it to have one found, or set PYREID_NO_CUDA=1 to "
                    "build without CUDA."
                )
            return nvcc
    found = shutil.which("nvcc", path=env.get("PATH", ""))
    if found is None:
        return None
    nvcc = inspect(Path(found), "PATH")
    unusable = unusable_because(nvcc, Path(found))
    if unusable:
        notes.append(f"nvcc on PATH is passed over: {unusable}.")
        return None
    return nvcc


def unusable_because(nvcc: Nvcc | None, path: Path) -> str | None:
    if not path.exists():
        return f"there is no {path}"
    if nvcc is None:
        return f"{path} does not run"
    if nvcc.version < OLDEST_CUDA:
        return f"{path} is CUDA {nvcc.release}, and pyreid needs {dotted(OLDEST_CUDA)} or newer"
    return None


def packaged_nvcc(search: list[str]) -> Nvcc | None:
    """nvcc as the nvidia-cuda-nvcc package installs it."""
    for folder in search:
        path = Path(folder) / "nvidia" / f"cu{PACKAGED_CUDA[0]}" / "bin" / "nvcc"
        if path.exists():
            return inspect(path, "PyPI")
    return None


def library_folders(nvcc: Nvcc) -> list[str]:
    """Where libcudart_static.a may be: toolkits, distributions and packages put it elsewhere."""
    listed = re.search(
        r"^#\$ LIBRARIES=(.*)$", _output([nvcc.path, "--dryrun", "-c", "x.cu"]), re.M
    )
    told = re.findall(r'"-L([^"]+)"', listed[1] if listed else "")
    return [*told, str(nvcc.home / "lib64"), str(nvcc.home / "lib")]


def known_architectures(nvcc: Nvcc) -> Architectures:
    """All that this nvcc can compile for."""
    sass = re.findall(r"^sm_(\w+)$", _output([nvcc.path, "--list-gpu-code"]) or "", re.M)
    ptx = re.findall(r"^compute_(\w+)$", _output([nvcc.path, "--list-gpu-arch"]) or "", re.M)
    return Architectures(tuple(sass), tuple(ptx))


def _output(command: list) -> str | None:
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
    except OSError:
        return None
    return done.stdout if done.returncode == 0 else None


# --- deciding -----------------------------------------------------------------------------------


def driver_obstacle(env: Mapping[str, str], driver) -> str | None:
    """Why packaged nvcc would be of no use here. No driver at all is fine: it may come later."""
    if driver is None or driver.cuda >= (PACKAGED_CUDA[0], 0) or flag(env, "PYREID_WHEEL"):
        return None
    return (
        f"the driver here supports CUDA {dotted(driver.cuda)}, and nvcc as a package exists for "
        f"CUDA {PACKAGED_CUDA[0]} only. Update the driver (release 580 or newer), or install a "
        f"CUDA {driver.cuda[0]}.x toolkit and set CUDA_HOME, then build again"
    )


def packages_exist() -> bool:
    return sys.platform == "linux" and os.uname().machine in ("x86_64", "aarch64")


def check_flags(env: Mapping[str, str]) -> None:
    if flag(env, "PYREID_NO_CUDA") and flag(env, "FORCE_CUDA"):
        raise ToolkitError(
            "PYREID_NO_CUDA and FORCE_CUDA are both set. Unset PYREID_NO_CUDA to build the CUDA "
            "kernels, or FORCE_CUDA to build without them."
        )


def requirements(env: Mapping[str, str], driver) -> list[str]:
    """The packages a build should ask for: those of nvcc, where nothing else brings it."""
    check_flags(env)
    if flag(env, "PYREID_NO_CUDA") or not packages_exist():
        return []
    if system_nvcc(env, []) is not None or driver_obstacle(env, driver):
        return []
    return PACKAGES


def find(env: Mapping[str, str], driver, search: list[str]) -> tuple[Nvcc | None, str | None, list]:
    """nvcc, or the reason why there is none, and notes."""
    notes: list[str] = []
    check_flags(env)
    if flag(env, "PYREID_NO_CUDA"):
        return None, "PYREID_NO_CUDA was set when it was built", notes
    nvcc = system_nvcc(env, notes)
    if nvcc is not None:
        return nvcc, None, notes
    reason = driver_obstacle(env, driver)
    remedy = ""
    if reason is None:
        nvcc = packaged_nvcc(search)
        reason = (
            "no nvcc was found: CUDA_HOME is not set, none is on PATH, and the package "
            "nvidia-cuda-nvcc is not installed (pip installs it for the build by itself, unless "
            "--no-build-isolation is given)"
        )
        packages = " ".join(repr(name) for name in PACKAGES)
        remedy = f" Put nvcc on PATH, set CUDA_HOME, or run: pip install {packages}"
    if nvcc is not None:
        return nvcc, None, notes
    if flag(env, "FORCE_CUDA"):
        raise ToolkitError(f"FORCE_CUDA is set, but {reason}.{remedy}")
    return None, reason, notes


def plan(env: Mapping[str, str], driver, search: list[str]) -> Plan:
    """With which nvcc, if any, and for which architectures to build."""
    nvcc, reason, notes = find(env, driver, search)
    if nvcc is None:
        return Plan(None, None, reason, tuple(notes))
    architectures = choose(env, driver, known_architectures(nvcc), nvcc.version, notes)
    if driver is not None and driver.cuda[0] < nvcc.version[0]:
        notes.append(
            f"the driver here supports CUDA {dotted(driver.cuda)}: it cannot run what nvcc "
            f"{dotted(nvcc.version)} compiles. Update the driver, or build with a "
            f"CUDA {driver.cuda[0]}.x toolkit (CUDA_HOME)."
        )
    return Plan(nvcc, architectures, None, tuple(notes))


# --- architectures ------------------------------------------------------------------------------


def number(name: str) -> int:
    """75 of "75", 90 of "90a"."""
    return int(re.match(r"\d+", name)[0])


def dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


def ordered(names) -> tuple[str, ...]:
    return tuple(sorted(set(names), key=lambda name: (number(name), name)))


def parse(text: str) -> Architectures:
    """A TORCH_CUDA_ARCH_LIST: "8.0;9.0+PTX", "7.5 8.6", "9.0a", "Hopper"."""
    sass, ptx = [], []
    for item in re.split(r"[;,\s]+", text.strip("; ,\t\n")):
        name, plus, suffix = item.partition("+")
        for capability in ARCHITECTURE_NAMES.get(name.lower(), name).split(";"):
            match = re.fullmatch(r"(\d+)\.(\d)([af]?)", capability)
            if match is None or (plus and suffix.upper() != "PTX"):
                raise ToolkitError(
                    f"TORCH_CUDA_ARCH_LIST is {text!r}, and {item!r} is no architecture. Write "
                    "compute capabilities, as in '8.0;9.0+PTX', or 'all'."
                )
            sass.append("".join(match.groups()))
            ptx += [sass[-1]] if plus else []
    return Architectures(ordered(sass), ordered(ptx))


def choose(
    env: Mapping[str, str],
    driver,
    known: Architectures,
    version: tuple[int, int],
    notes: list[str],
) -> Architectures:
    """What is asked for, else what wheels carry, else the GPUs here, else the portable default."""
    text = env.get("TORCH_CUDA_ARCH_LIST", "").strip()
    if text and text.lower() != "all":
        wanted = parse(text)
        # nvcc lists sm_90, and knows sm_90a with it.
        unknown = [f"sm_{name}" for name in wanted.sass if str(number(name)) not in known.sass]
        if unknown:
            raise ToolkitError(
                f"TORCH_CUDA_ARCH_LIST is {text!r}, but nvcc {dotted(version)} cannot compile for "
                f"{', '.join(unknown)}; it knows {', '.join(ordered(known.sass))}."
            )
        return wanted
    if text or flag(env, "PYREID_WHEEL"):
        return restrict(Architectures(WHEEL_SASS, WHEEL_PTX), known, version, notes)
    if driver is not None and driver.devices:
        fitting = for_devices(driver.devices, known, version, notes)
        if fitting.sass or fitting.ptx:
            return fitting
    return restrict(Architectures(PORTABLE_SASS, PORTABLE_PTX), known, version, notes)


def restrict(
    wanted: Architectures, known: Architectures, version: tuple[int, int], notes: list[str]
) -> Architectures:
    """`wanted` without what nvcc does not know, and with PTX for the newest GPUs all the same."""
    dropped = [f"sm_{name}" for name in wanted.sass if name not in known.sass]
    if dropped:
        notes.append(f"nvcc {dotted(version)} cannot compile for {', '.join(dropped)}: left out.")
    sass = [name for name in wanted.sass if name in known.sass]
    ptx = [name for name in wanted.ptx if name in known.ptx]
    if len(ptx) < len(wanted.ptx):
        ptx.append(sass[-1])
    return Architectures(ordered(sass), ordered(ptx))


def for_devices(
    devices, known: Architectures, version: tuple[int, int], notes: list[str]
) -> Architectures:
    """Machine code for each GPU here, and PTX of the newest, for one that comes later.

    A GPU newer than nvcc gets the code of an older one of its generation, or PTX.
    """
    sass, ptx = [], []
    plain = ordered(name for name in known.sass if name.isdigit())
    for device in devices:
        capability = 10 * device.capability[0] + device.capability[1]
        older = [name for name in plain if number(name) <= capability]
        if not older:
            notes.append(
                f"nvcc {dotted(version)} cannot compile for {device.name} (compute capability "
                f"{dotted(device.capability)}): to use it, build with an older toolkit."
            )
        elif number(older[-1]) // 10 == device.capability[0]:
            sass.append(older[-1])
        else:
            ptx.append(older[-1])
    newest = ordered([*sass, *ptx])[-1:]
    return Architectures(ordered(sass), ordered([*ptx, *newest]))


if __name__ == "__main__":
    if sys.argv[1:] != ["requirements"]:
        sys.exit(__doc__)
    try:
        print(*requirements(os.environ, load_driver()))
    except ToolkitError as error:
        sys.exit(f"pyreid: {error}")
