"""What was built, what is here, whether they fit, and what to do if not.

python -m pyreid.info          # or: pyreid info
python -m pyreid.info --json
"""

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import platform
import re
import runpy
from pathlib import Path
from typing import Any

from pyreid import _driver

# The first driver release of each CUDA generation.
_FIRST_DRIVER = {12: "525", 13: "580"}
_REBUILD = "pip install --force-reinstall --no-deps . (in pyreid's source folder)"


def report() -> dict[str, Any]:
    """All that `python -m pyreid.info` prints, as plain values."""
    built, driver = _built(), _driver.query()
    torch = _torch()
    fits, advice = judge(built, driver, torch)
    cpu_variant, cuda_error = _chosen()
    return {
        "version": built["version"] if built else None,
        "built": built,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "driver": _described(driver),
        "numpy": _version("numpy"),
        "torch": torch,
        "cupy": _version("cupy-cuda13x", "cupy-cuda12x", "cupy"),
        "cpu_variant": cpu_variant,
        "cuda_error": cuda_error,
        "fits": fits,
        "advice": advice,
    }


def judge(
    built: dict[str, Any] | None, driver: _driver.Driver | None, torch: dict[str, Any] | None
) -> tuple[bool, list[str]]:
    """Whether every GPU here can run what was built, and what there is to say about it."""
    if built is None:
        return False, ["pyreid is not built: run pip install . (or make build) in its folder."]
    if driver is None:
        cause = "" if built["cuda"] else f" (nor was it built: {built['no_cuda_reason']})"
        return True, [f"There is no CUDA driver here, so CUDA is not used{cause}: the CPU works."]
    if driver.error:
        return False, [f"No GPU can be used, for {driver.error}. Does nvidia-smi work?"]
    if not driver.devices:
        return True, ["The driver shows no GPU, so the CPU is used. Is CUDA_VISIBLE_DEVICES set?"]
    if not built["cuda"]:
        return False, [
            f"There is a GPU, but the CUDA floor was not built: {built['no_cuda_reason']}. "
            f"With that settled: FORCE_CUDA=1 {_REBUILD}"
        ]
    toolkit = _numbers(built["cuda"]["version"])
    if driver.cuda[0] < toolkit[0]:
        first = _FIRST_DRIVER.get(toolkit[0])
        return False, [
            f"The driver is too old: it supports CUDA {_dotted(driver.cuda)}, and pyreid was "
            f"built with CUDA {_dotted(toolkit)}. Update it"
            + (f" to release {first} or newer" if first else "")
            + f", or build pyreid with a CUDA {driver.cuda[0]}.x toolkit: "
            f"CUDA_HOME=... {_REBUILD}"
        ]
    routes = [
        (device, _route(device.capability, built["cuda"], driver.cuda)) for device in driver.devices
    ]
    advice = [_device_advice(device, route) for device, route in routes]
    if torch and not torch["cuda"]:
        advice.append("torch is built for the CPU only: its tensors cannot be on the GPU.")
    return all(route for _, route in routes), advice


def runs(name: str, capability: tuple[int, int]) -> bool:
    """Does machine code `name` ("80", "90a") run on a GPU of this compute capability?

    Code runs on its generation from its own minor version up; "90a" on 9.0 alone.
    """
    major, minor = _numbers_of_architecture(name)
    if name.endswith("a"):
        return (major, minor) == capability
    return major == capability[0] and minor <= capability[1]


def compiles(name: str, capability: tuple[int, int]) -> bool:
    """Can the driver make code for this GPU from PTX `name`?"""
    architecture = _numbers_of_architecture(name)
    if name.endswith("a"):
        return architecture == capability
    if name.endswith("f"):
        return architecture[0] == capability[0] and architecture <= capability
    return architecture <= capability


def _route(
    capability: tuple[int, int], cuda: dict[str, Any], driver_cuda: tuple[int, int]
) -> str | None:
    """How a GPU gets its code, or None if it cannot."""
    codes = [name for name in cuda["sass"] if runs(name, capability)]
    if codes:
        return f"runs its sm_{codes[-1]} code"
    # A driver reads the PTX of its own CUDA version and of older ones.
    sources = [name for name in cuda["ptx"] if compiles(name, capability)]
    if sources and driver_cuda >= _numbers(cuda["version"]):
        return f"runs PTX {sources[-1]}, which the driver compiles at first use"
    return None


def _device_advice(device: _driver.Device, route: str | None) -> str:
    capability = _dotted(device.capability)
    if route:
        return f"{device.name} {route}."
    return (
        f"{device.name} (compute capability {capability}) has no code in this build. Build for "
        f"it: TORCH_CUDA_ARCH_LIST={capability} {_REBUILD}"
    )


# --- what there is --------------------------------------------------------------------------------


def _built() -> dict[str, Any] | None:
    try:
        record = importlib.import_module("pyreid._build")
    except ModuleNotFoundError:
        return None
    cuda = {
        "version": record.CUDA_VERSION,
        "nvcc": record.NVCC_SOURCE,
        "sass": list(record.CUDA_SASS),
        "ptx": list(record.CUDA_PTX),
    }
    return {
        "version": record.VERSION,
        "floors": list(record.FLOORS),
        "cpu_variants": list(record.CPU_VARIANTS),
        "compiler": record.COMPILER,
        "cuda": cuda if record.CUDA_VERSION else None,
        "no_cuda_reason": record.NO_CUDA_REASON,
    }


def _described(driver: _driver.Driver | None) -> dict[str, Any] | None:
    if driver is None:
        return None
    devices = [{"name": name, "capability": _dotted(cc)} for name, cc in driver.devices]
    return {
        "cuda": _dotted(driver.cuda),
        "release": driver.release,
        "devices": devices,
        "error": driver.error,
    }


def _torch() -> dict[str, Any] | None:
    """torch's version and CUDA, from its version file: importing torch takes seconds, or fails."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    try:
        values = runpy.run_path(str(Path(spec.origin).parent / "version.py"))
    except OSError:
        return None
    return {"version": str(values.get("__version__")), "cuda": values.get("cuda")}


def _version(*names: str) -> str | None:
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _chosen() -> tuple[str | None, str | None]:
    """The CPU variant in use, and why the CUDA floor cannot be used, if so."""
    try:
        from pyreid import _native

        return _native.cpu_variant(), _native.cuda_error()
    except ImportError as error:  # nothing built, or built for another Python: say it, do not fall
        return None, str(error)


# --- text -----------------------------------------------------------------------------------------


def text(facts: dict[str, Any]) -> str:
    """`facts`, as `report` returns them, for people."""
    built = facts["built"]
    lines = [f"pyreid {facts['version'] or '(not built)'}", ""]
    if built:
        lines += ["Built", *_rows(_built_rows(built)), ""]
    lines += ["Here", *_rows(_here_rows(facts)), ""]
    lines += ["Fit" if facts["fits"] else "NO FIT", *(f"  {line}" for line in facts["advice"])]
    if facts["cuda_error"] and built and built["cuda"]:
        lines.append(f"  CUDA cannot be used: {facts['cuda_error']}")
    return "\n".join(lines)


def _built_rows(built: dict[str, Any]) -> dict[str, str]:
    rows = {
        "floors": ", ".join(built["floors"]),
        "cpu": f"{', '.join(built['cpu_variants'])} by {built['compiler']}",
        "cuda": f"no: {built['no_cuda_reason']}",
    }
    if built["cuda"]:
        codes = [f"sm_{name}" for name in built["cuda"]["sass"]]
        codes += [f"PTX {name}" for name in built["cuda"]["ptx"]]
        rows["cuda"] = (
            f"{built['cuda']['version']} (nvcc from {built['cuda']['nvcc']}): {', '.join(codes)}"
        )
    return rows


def _here_rows(facts: dict[str, Any]) -> dict[str, str]:
    driver, torch = facts["driver"], facts["torch"]
    rows = {
        "python": f"{facts['python']} on {facts['machine']}",
        "cpu": facts["cpu_variant"] or "none loads",
        "driver": "none",
        "numpy": facts["numpy"] or "none",
        "torch": f"{torch['version']}, CUDA {torch['cuda'] or 'none'}" if torch else "none",
        "cupy": facts["cupy"] or "none",
    }
    if driver:
        rows["driver"] = f"{driver['release'] or 'present'}, supports CUDA {driver['cuda']}"
        for ordinal, device in enumerate(driver["devices"]):
            rows[f"gpu {ordinal}"] = f"{device['name']}, compute capability {device['capability']}"
    return rows


def _rows(values: dict[str, str]) -> list[str]:
    return [f"  {name:8}{value}" for name, value in values.items()]


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


def _numbers(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def _numbers_of_architecture(name: str) -> tuple[int, int]:
    number = int(re.sub(r"\D", "", name))
    return number // 10, number % 10


def main(arguments: list[str] | None = None) -> int:
    """Prints the report; `arguments` are those after `pyreid info`."""
    parser = argparse.ArgumentParser(
        prog="pyreid info", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    options = parser.parse_args(arguments)
    facts = report()
    print(json.dumps(facts, indent=2) if options.json else text(facts))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
