"""What the build decides, in environments made up for it, and what `pyreid info` makes of it."""

import importlib
import json
import stat
import sys
from pathlib import Path

import pytest

from pyreid import info
from pyreid._driver import Device, Driver

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ROOT / "build_tools"

pytestmark = pytest.mark.skipif(not TOOLS.exists(), reason="the build tools are not here")

KNOWN_13 = ("75", "80", "86", "87", "88", "89", "90", "100", "103", "110", "120", "121")
KNOWN_12 = ("50", "60", "70", "75", "80", "86", "87", "89", "90")


@pytest.fixture
def toolkit(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    return importlib.import_module("toolkit")


@pytest.fixture
def native(toolkit):
    return importlib.import_module("native")


@pytest.fixture
def make_toolkit(tmp_path):
    """Writes a folder with an nvcc that answers as one of the given release would."""

    def make(release="13.0.88", folder="cuda", known=KNOWN_13):
        home = tmp_path / folder
        codes = "\\n".join(f"sm_{name}" for name in known)
        arches = "\\n".join(f"compute_{name}" for name in known)
        nvcc = home / "bin" / "nvcc"
        nvcc.parent.mkdir(parents=True)
        nvcc.write_text(
            "#!/bin/sh\n"
            'case "$1" in\n'
            f"--version) echo 'release {release[:4]}, V{release}';;\n"
            f"--dryrun) echo '#$ TOP={home}/bin/..';;\n"
            f"--list-gpu-code) printf '{codes}\\n';;\n"
            f"--list-gpu-arch) printf '{arches}\\n';;\n"
            "esac\n"
        )
        nvcc.chmod(nvcc.stat().st_mode | stat.S_IXUSR)
        return home

    return make


def driver(cuda=(13, 0), *capabilities):
    devices = tuple(Device(f"GPU {major}.{minor}", (major, minor)) for major, minor in capabilities)
    return Driver(cuda, "1.2", devices, None)


# --- which nvcc -----------------------------------------------------------------------------------


def test_cuda_home_comes_before_path(toolkit, make_toolkit):
    home, other = make_toolkit(folder="home"), make_toolkit("12.8.61", folder="other")
    env = {"CUDA_HOME": str(home), "PATH": str(other / "bin")}
    nvcc = toolkit.plan(env, None, []).nvcc
    assert (nvcc.source, nvcc.release, nvcc.version) == ("CUDA_HOME", "13.0.88", (13, 0))
    assert nvcc.home == home.resolve()


def test_path_comes_before_packages(toolkit, make_toolkit, tmp_path):
    make_toolkit(folder="site/nvidia/cu13")
    other = make_toolkit("12.8.61", folder="other")
    search = [str(tmp_path / "site")]
    assert toolkit.plan({"PATH": str(other / "bin")}, None, search).nvcc.source == "PATH"
    assert toolkit.plan({"PATH": ""}, None, search).nvcc.source == "PyPI"


def test_nvcc_reached_through_a_link_or_script_knows_its_home(toolkit, make_toolkit, tmp_path):
    home = make_toolkit()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").symlink_to(home / "bin" / "nvcc")
    assert toolkit.plan({"PATH": str(tmp_path / "bin")}, None, []).nvcc.home == home.resolve()


@pytest.mark.parametrize("variable", ["CUDA_HOME", "CUDA_PATH"])
def test_cuda_home_without_nvcc_is_an_error_that_names_it(toolkit, tmp_path, variable):
    with pytest.raises(toolkit.ToolkitError, match=f"{variable} is '{tmp_path}', but there is no"):
        toolkit.plan({variable: str(tmp_path), "PATH": ""}, None, [])


def test_cuda_home_too_old_is_an_error(toolkit, make_toolkit):
    home = make_toolkit("11.8.89")
    with pytest.raises(toolkit.ToolkitError, match=r"is CUDA 11\.8\.89, and pyreid needs 12\.0"):
        toolkit.plan({"CUDA_HOME": str(home), "PATH": ""}, None, [])


def test_nvcc_on_path_that_does_not_run_is_passed_over_aloud(toolkit, tmp_path):
    broken = tmp_path / "nvcc"
    broken.write_text("#!/bin/sh\nexec /nowhere/nvcc\n")
    broken.chmod(0o755)
    plan = toolkit.plan({"PATH": str(tmp_path)}, None, [])
    assert plan.nvcc is None
    assert plan.notes == (f"nvcc on PATH is passed over: {broken} does not run.",)


def test_without_nvcc_the_reason_is_kept(toolkit):
    plan = toolkit.plan({"PATH": ""}, None, [])
    assert plan.nvcc is None
    assert "no nvcc was found" in plan.reason


# --- flags ----------------------------------------------------------------------------------------


def test_force_cuda_without_nvcc_fails_with_reason_and_remedy(toolkit):
    with pytest.raises(
        toolkit.ToolkitError, match=r"FORCE_CUDA is set, but no nvcc.*run: pip install"
    ):
        toolkit.plan({"FORCE_CUDA": "1", "PATH": ""}, None, [])


def test_no_cuda_wins_over_an_nvcc(toolkit, make_toolkit):
    env = {"CUDA_HOME": str(make_toolkit()), "PYREID_NO_CUDA": "1"}
    plan = toolkit.plan(env, None, [])
    assert plan.nvcc is None
    assert plan.reason == "PYREID_NO_CUDA was set when it was built"
    assert toolkit.requirements({"PATH": "", "PYREID_NO_CUDA": "1"}, None) == []


def test_no_cuda_and_force_cuda_contradict(toolkit):
    env = {"PYREID_NO_CUDA": "1", "FORCE_CUDA": "1", "PATH": ""}
    with pytest.raises(toolkit.ToolkitError, match="are both set"):
        toolkit.plan(env, None, [])
    with pytest.raises(toolkit.ToolkitError, match="are both set"):
        toolkit.requirements(env, None)


@pytest.mark.parametrize("value", ["", "0", "no", "OFF", "false"])
def test_flags_can_be_turned_off(toolkit, value):
    assert not toolkit.flag({"FORCE_CUDA": value}, "FORCE_CUDA")


# --- packages -------------------------------------------------------------------------------------


def test_packages_are_asked_for_only_without_nvcc(toolkit, make_toolkit, monkeypatch):
    monkeypatch.setattr(toolkit, "packages_exist", lambda: True)
    assert toolkit.requirements({"PATH": ""}, None) == toolkit.PACKAGES
    assert toolkit.requirements({"PATH": str(make_toolkit() / "bin")}, None) == []
    assert "nvidia-cuda-nvcc==13.0.*" in toolkit.PACKAGES


def test_packages_are_not_asked_for_where_there_are_none(toolkit, monkeypatch):
    monkeypatch.setattr(toolkit, "packages_exist", lambda: False)
    assert toolkit.requirements({"PATH": ""}, None) == []


def test_an_old_driver_makes_packages_useless_and_says_so(
    toolkit, make_toolkit, monkeypatch, tmp_path
):
    monkeypatch.setattr(toolkit, "packages_exist", lambda: True)
    make_toolkit(folder="site/nvidia/cu13")
    old, search = driver((12, 4), (8, 0)), [str(tmp_path / "site")]
    assert toolkit.requirements({"PATH": ""}, old) == []
    plan = toolkit.plan({"PATH": ""}, old, search)
    assert plan.nvcc is None
    assert plan.reason.startswith("the driver here supports CUDA 12.4")
    with pytest.raises(toolkit.ToolkitError, match=r"FORCE_CUDA is set, but the driver.*again\.$"):
        toolkit.plan({"PATH": "", "FORCE_CUDA": "1"}, old, search)
    # A wheel is built for other machines: this one's driver does not matter.
    assert toolkit.requirements({"PATH": "", "PYREID_WHEEL": "1"}, old) == toolkit.PACKAGES
    assert toolkit.plan({"PATH": "", "PYREID_WHEEL": "1"}, old, search).nvcc.source == "PyPI"


def test_a_toolkit_newer_than_the_driver_is_noticed(toolkit, make_toolkit):
    plan = toolkit.plan({"CUDA_HOME": str(make_toolkit())}, driver((12, 4), (8, 0)), [])
    assert plan.nvcc is not None
    assert any("cannot run what nvcc 13.0 compiles" in note for note in plan.notes)


def test_backend_asks_for_the_packages_on_top_of_setuptools(toolkit, native, monkeypatch):
    pytest.importorskip("setuptools", minversion="77")
    backend = importlib.import_module("backend")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(backend.build_meta, "get_requires_for_build_wheel", lambda settings: ["x"])
    monkeypatch.setattr(toolkit, "requirements", lambda env, driver: ["nvcc"])
    assert backend.get_requires_for_build_wheel() == ["x", "nvcc"]

    def fail(env, driver):
        raise toolkit.ToolkitError("why")

    monkeypatch.setattr(toolkit, "requirements", fail)
    with pytest.raises(SystemExit, match="pyreid: why"):
        backend.get_requires_for_build_wheel()


# --- architectures --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "sass", "ptx"),
    [
        ("8.0", ("80",), ()),
        ("8.0;9.0+PTX", ("80", "90"), ("90",)),
        ("9.0+PTX 7.5", ("75", "90"), ("90",)),
        ("10.0, 9.0a ;", ("90a", "100"), ()),
        ("Ampere;Hopper+PTX", ("80", "86", "90"), ("90",)),
        ("8.0 8.0", ("80",), ()),
    ],
)
def test_architecture_lists(toolkit, text, sass, ptx):
    assert toolkit.parse(text) == toolkit.Architectures(sass, ptx)


@pytest.mark.parametrize("text", ["sm_80", "8", "8.0+SASS", "Volta2", "8.0;x"])
def test_what_is_no_architecture_is_an_error(toolkit, text):
    with pytest.raises(toolkit.ToolkitError, match="is no architecture"):
        toolkit.parse(text)


def choose(toolkit, env, driver=None, known=KNOWN_13, version=(13, 0)):
    notes = []
    known = toolkit.Architectures(known, known)
    return toolkit.choose(env, driver, known, version, notes), notes


def test_the_list_comes_before_the_devices(toolkit):
    env = {"TORCH_CUDA_ARCH_LIST": "8.6", "PYREID_WHEEL": "1"}
    assert choose(toolkit, env, driver((13, 0), (9, 0)))[0] == (("86",), ())


def test_a_listed_architecture_that_nvcc_does_not_know_is_an_error(toolkit):
    with pytest.raises(
        toolkit.ToolkitError, match=r"nvcc 13\.0 cannot compile for sm_70; it knows 75"
    ):
        choose(toolkit, {"TORCH_CUDA_ARCH_LIST": "7.0;8.0"})


def test_a_variant_is_known_with_its_base(toolkit):
    env = {"TORCH_CUDA_ARCH_LIST": "9.0a+PTX"}
    assert choose(toolkit, env)[0] == (("90a",), ("90a",))


@pytest.mark.parametrize("env", [{"PYREID_WHEEL": "1"}, {"TORCH_CUDA_ARCH_LIST": "all"}])
def test_wheels_carry_all(toolkit, env):
    architectures, notes = choose(toolkit, env, driver((13, 0), (9, 0)))
    assert architectures == (("75", "80", "86", "89", "90", "100", "120"), ("80", "120"))
    assert notes == []


def test_an_older_nvcc_leaves_out_what_it_does_not_know(toolkit):
    architectures, notes = choose(toolkit, {"PYREID_WHEEL": "1"}, None, KNOWN_12, (12, 4))
    assert architectures == (("75", "80", "86", "89", "90"), ("80", "90"))
    assert notes == ["nvcc 12.4 cannot compile for sm_100, sm_120: left out."]


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ([(9, 0)], (("90",), ("90",))),
        ([(8, 6), (8, 9), (8, 6)], (("86", "89"), ("89",))),
        ([(12, 5)], (("121",), ("121",))),  # newer than nvcc: the code of its generation
        ([(13, 0)], ((), ("121",))),  # newer than nvcc: PTX
    ],
)
def test_the_devices_here(toolkit, capabilities, expected):
    assert choose(toolkit, {}, driver((13, 0), *capabilities))[0] == expected


def test_a_device_too_old_for_nvcc_is_said(toolkit):
    architectures, notes = choose(toolkit, {}, driver((13, 0), (7, 0)))
    assert architectures == (toolkit.PORTABLE_SASS, toolkit.PORTABLE_PTX)
    assert "cannot compile for GPU 7.0 (compute capability 7.0)" in notes[0]


@pytest.mark.parametrize(
    "capability",
    [(7, 5), (8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (10, 3), (11, 0), (12, 1)],
)
@pytest.mark.parametrize("env", [{}, {"PYREID_WHEEL": "1"}])
def test_portable_builds_run_on_everything(toolkit, env, capability):
    architectures, _ = choose(toolkit, env)
    assert any(info.runs(name, capability) for name in architectures.sass) or any(
        info.compiles(name, capability) for name in architectures.ptx
    )


def test_architecture_flags(toolkit):
    assert toolkit.Architectures(("80",), ("90",)).flags() == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=compute_90",
    ]


# --- the compilers --------------------------------------------------------------------------------


def test_max_jobs(native, toolkit):
    assert native.job_count({"MAX_JOBS": "3"}) == 3
    assert native.job_count({}) >= 1
    with pytest.raises(toolkit.ToolkitError, match="MAX_JOBS must be a number from 1 up, got 'x'"):
        native.job_count({"MAX_JOBS": "x"})


def test_memory_limits_the_jobs(native, monkeypatch):
    monkeypatch.setattr(native, "free_memory", lambda: 1 << 30)
    assert native.job_count({}) == 1


def test_a_missing_compiler_is_named(native, toolkit):
    with pytest.raises(toolkit.ToolkitError, match="there is no C\\+\\+ compiler 'no-such-c"):
        native.compiler({"CXX": "no-such-c++"})


def test_ninja_commands_are_quoted(native):
    words = ["g++", "$in", "$out.d", "a b", "$HOME", native.Raw("&& x")]
    assert native.shell(words) == "g++ $in $out.d 'a b' '$$HOME' && x"


def test_ptxas_reports_are_read(native):
    resources = importlib.import_module("resources")
    log = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'k1' for 'sm_80'
ptxas info    : Function properties for k1
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 4096 bytes smem, 372 bytes cmem[0]
ptxas info    : Compiling entry function 'k2' for 'sm_90a'
ptxas info    : Function properties for k2
    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 255 registers, 372 bytes cmem[0]
"""
    good, bad = resources.parse(log, "file")
    assert good == ("file", "k1", "80", 32, 4096, 0, 0)
    assert bad == ("file", "k2", "90a", 255, 0, 16, 12)
    assert (good.is_bad, bad.is_bad) == (False, True)

    ptx = """
.visible .entry k1(
	.param .u64 k1_param_0
)
.maxntid 256, 1, 1
.minnctapersm 4
{
	mov.u32 	%r1, _ZN6pyreid21pyreid_dynamic_sharedE;
}
.visible .entry k2()
{
}
"""
    found = resources.launches(ptx)
    assert found == {"k1": (256, True), "k2": (0, False)}
    head, first, second, told = resources.table([good, bad], found).split("\n")
    assert head.split() == ["threads", "shared", "sm_80", "sm_90a"]
    assert first.split() == ["256", "4096+", "32", "100%", "file:", "k1"]
    assert second.split() == ["?", "0", "255!", "file:", "k2"]
    assert told.split()[:3] == ["!", "sm_90a:", "16"]


@pytest.mark.parametrize(
    ("architecture", "registers", "shared", "threads", "blocks", "share", "limits"),
    [
        ("75", 32, 0, 256, 4, 1.0, {"warps"}),
        ("75", 64, 0, 256, 4, 1.0, {"warps", "registers"}),
        ("75", 32, 33_000, 256, 1, 0.25, {"shared"}),
        ("80", 32, 0, 256, 8, 1.0, {"warps", "registers"}),
        ("80", 33, 0, 256, 6, 0.75, {"registers"}),  # given to a warp in units of 256: 40 a thread
        ("80", 40, 0, 128, 12, 0.75, {"registers"}),
        ("80", 16, 0, 32, 32, 0.5, {"blocks"}),
        ("80", 32, 48 * 1024, 256, 3, 0.375, {"shared"}),  # and one KiB each for the system
        ("86", 40, 0, 256, 6, 1.0, {"warps", "registers"}),
        ("86", 32, 0, 32, 16, 1 / 3, {"blocks"}),
        ("89", 32, 0, 32, 24, 0.5, {"blocks"}),
        ("90", 32, 48 * 1024, 256, 4, 0.5, {"shared"}),
        ("90a", 168, 0, 384, 1, 0.1875, {"registers"}),
        ("100", 255, 0, 128, 2, 0.125, {"registers"}),
        ("120", 32, 48 * 1024, 256, 2, 1 / 3, {"shared"}),
        ("120", 65, 0, 512, 1, 1 / 3, {"registers"}),
        ("80", 128, 0, 1024, 0, 0.0, {"registers"}),
    ],
)
def test_occupancy(native, architecture, registers, shared, threads, blocks, share, limits):
    found = importlib.import_module("occupancy").occupancy(architecture, registers, shared, threads)
    assert (found.blocks, found.share) == (blocks, pytest.approx(share))
    assert found.warps == blocks * threads // 32
    assert set(found.limits) == limits


def test_occupancy_is_known_of_every_architecture(native, toolkit):
    assert set(KNOWN_13) == set(importlib.import_module("occupancy").MULTIPROCESSORS)


# --- info -----------------------------------------------------------------------------------------


def built(sass=("80", "90"), ptx=("75", "90"), version="13.0.88", reason=None):
    cuda = {"version": version, "nvcc": "PyPI", "sass": list(sass), "ptx": list(ptx)}
    return {
        "version": "0.1.0",
        "floors": ["cpu", "cuda"],
        "cpu_variants": ["_cpu"],
        "compiler": "g++",
        "cuda": None if reason else cuda,
        "no_cuda_reason": reason,
    }


@pytest.mark.parametrize(
    ("record", "here", "fits", "words"),
    [
        (None, None, False, "pyreid is not built"),
        (built(), None, True, "There is no CUDA driver here"),
        (built(reason="no nvcc"), None, True, "nor was it built: no nvcc"),
        (built(), driver((13, 0)), True, "shows no GPU"),
        (built(), Driver((13, 0), None, (), "a reason"), False, "for a reason"),
        (built(reason="no nvcc"), driver((13, 0), (9, 0)), False, "not built: no nvcc"),
        (built(), driver((12, 8), (9, 0)), False, "Update it to release 580 or newer"),
        (built(), driver((13, 0), (9, 0)), True, "GPU 9.0 runs its sm_90 code."),
        (built(), driver((13, 0), (8, 9)), True, "GPU 8.9 runs its sm_80 code."),
        (built(), driver((13, 0), (12, 0)), True, "runs PTX 90, which the driver compiles"),
        (built(ptx=()), driver((13, 0), (12, 0)), False, "TORCH_CUDA_ARCH_LIST=12.0"),
        # A driver reads no PTX that is newer than itself, though it runs the machine code.
        (built(version="13.1.0"), driver((13, 0), (7, 5)), False, "TORCH_CUDA_ARCH_LIST=7.5"),
        (built(version="13.1.0"), driver((13, 0), (9, 0)), True, "runs its sm_90 code."),
    ],
)
def test_info_judges(record, here, fits, words):
    judged, advice = info.judge(record, here, None)
    assert judged is fits
    assert words in " ".join(advice)


def test_info_mentions_a_torch_without_cuda():
    _, advice = info.judge(built(), driver((13, 0), (9, 0)), {"version": "2.9", "cuda": None})
    assert advice[-1].startswith("torch is built for the CPU only")


def test_special_architectures_run_where_they_should():
    assert info.runs("90a", (9, 0))
    assert not info.runs("100a", (10, 3))
    assert not info.runs("86", (8, 0))
    assert info.compiles("100f", (10, 3))
    assert not info.compiles("100f", (12, 0))
    assert not info.compiles("90a", (10, 0))


def test_report_is_complete_and_printable(capsys):
    facts = info.report()
    assert facts["python"] == sys.version.split()[0]
    assert facts["advice"]
    assert info.main(["--json"]) == 0
    assert json.loads(capsys.readouterr().out) == facts
    assert info.main([]) == 0
    printed = capsys.readouterr().out
    assert all(line in printed for line in facts["advice"])


def test_report_without_torch(monkeypatch):
    monkeypatch.setattr(info.importlib.util, "find_spec", lambda name: None)
    assert info.report()["torch"] is None


def test_report_with_a_package_that_is_not_built(monkeypatch):
    monkeypatch.setattr(info, "_built", lambda: None)
    facts = info.report()
    assert facts["fits"] is False
    assert "not built" in info.text(facts)
