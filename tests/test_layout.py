"""The shape of the house: every op has every room; imports go down only; the native core knows no torch."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = [
    "csrc/cuda/{}.cu",
    "csrc/cpu/{}.cpp",
    "csrc/bind/{}.cpp",
    "pyreid/ops/{}.py",
    "pyreid/reference/{}.py",
    "tests/test_{}.py",
    "benchmarks/bench_{}.py",
]
OPS = sorted(path.stem for path in (ROOT / "pyreid/ops").glob("[!_]*.py"))

# What a module may import of pyreid: only what stands further right.
FLOORS = [
    *(
        "cli",
        "demo",
        "commands",
        "compat",
        "stages",
        "train",
        "methods",
        "report",
        "pictures",
        "evaluation",
        "quality",
    ),
    *("models", "meshes", "people", "data", "losses", "sharded", "memory", "files", "options"),
    *("page", "progress", "ops", "distributed", "_native", "_build"),
]
BESIDE = {"info": {"_native", "_build", "_driver"}, "_driver": set(), "reference": set()}


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_its_rooms(op):
    assert [room.format(op) for room in ROOMS if not (ROOT / room.format(op)).exists()] == []


@pytest.mark.parametrize("op", OPS)
def test_every_op_is_in_the_contract(op):
    assert f"// --- {op} -" in (ROOT / "csrc/ops.h").read_text()


def imports(path):
    """Names directly below pyreid that a module imports, at whatever depth of its code."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "pyreid":
            names = [f"pyreid.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module]
        else:
            continue
        yield from (name.split(".")[1] for name in names if name.startswith("pyreid."))


def modules():
    paths = sorted((ROOT / "pyreid").rglob("*.py"))
    return [pytest.param(path, id=str(path.relative_to(ROOT))) for path in paths]


@pytest.mark.parametrize("path", modules())
def test_imports_go_down(path):
    room = path.relative_to(ROOT / "pyreid").parts[0].removesuffix(".py")
    found = set(imports(path)) - {room}
    if room in BESIDE:
        assert found <= BESIDE[room]
    elif room in FLOORS:
        assert found <= {
            *FLOORS[FLOORS.index(room) + 1 :],
            *(BESIDE if room == "cli" else ()),
            "benchmarks",
        }
    else:
        assert room == "__init__"


def native_sources():
    return [
        path for path in (ROOT / "csrc").rglob("*") if path.suffix in {".h", ".cpp", ".cu", ".cuh"}
    ]


def test_native_core_knows_no_torch():
    pattern = re.compile(
        r'#include\s*[<"](torch|ATen|c10)/|py(bind11)?::module_?::import\("torch|import torch'
    )
    assert native_sources()
    assert [path for path in native_sources() if pattern.search(path.read_text())] == []


def test_kernels_are_launched_through_launch():
    launches = [p for p in native_sources() if p.name != "portable.cuh" and "<<<" in p.read_text()]
    assert launches == []
