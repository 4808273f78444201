import fcntl
import os
import struct
import subprocess
import sys
import termios

import numpy as np
import pytest
import scipy.io
import torch

from pyreid import cli, files, ops

IDS = np.arange(240) % 12


def people(size=240, ids=12, seed=0):
    """Unit features around the centres of `ids` people; every tenth is of nobody."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((ids, 24))[np.arange(size) % ids]
    x = x + 0.5 * rng.standard_normal(x.shape)
    x[::10] = rng.standard_normal(x[::10].shape)
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def features(tmp_path):
    path = tmp_path / "features.npy"
    np.save(path, people())
    return path


def run(*arguments):
    return cli.main([str(argument) for argument in arguments])


def refused(capsys, *arguments):
    """The message of a command that must fail; the progress before it is not looked at."""
    assert run(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    return err.splitlines()[-1].split(": ", 1)[1]


# --- cluster --------------------------------------------------------------------------------------


def test_cluster_as_a_program(features, tmp_path):
    output = tmp_path / "labels.npy"
    command = [sys.executable, "-m", "pyreid.cli", "cluster", features, "-o", output]
    done = subprocess.run([*command, "--eps", "0.5"], capture_output=True, text=True, check=True)
    labels, stats = ops.pseudo_labels(people(), eps=0.5, return_stats=True)
    found = np.load(output)
    assert found.dtype == np.int64
    np.testing.assert_array_equal(found, labels)
    sizes = sorted(np.bincount(labels[labels >= 0]).tolist(), reverse=True)[:8]
    lines = done.stdout.splitlines()
    assert lines[0] == f"240 rows of 24 features; {stats.pairs} near pairs"
    share = f"{stats.noise / 240:.1%}"
    assert lines[1] == f"eps 0.5: {stats.clusters} clusters, {stats.noise} noise ({share})"
    assert lines[2] == f"  largest: {', '.join(map(str, sizes))}"
    assert lines[3].startswith("seconds: neighbours ")
    assert lines[4] == f"labels: {output}"
    stages = [line.split(" s  ")[1] for line in done.stderr.splitlines()]
    assert stages == [
        f"reading {features}",
        "neighbours of 240 rows",
        "jaccard of 240 rows",
        "dbscan of 240 rows",
    ]
    assert sorted(tmp_path.iterdir()) == [features, output]


def test_cluster_with_every_option(tmp_path, capsys):
    source, output = tmp_path / "all.npz", tmp_path / "labels.npz"
    cameras = np.arange(240) % 3
    np.savez(source, a=3 * people(), b=people(seed=1), cameras=cameras, ids=IDS.astype(float))
    options = "--k1 12 --k2 4 --min-samples 3 --eps 0.3,0.6 --variant ca-jaccard --normalize"
    keys = "--key a --cameras-key cameras --ids-key ids"
    assert run("cluster", source, "-o", output, *options.split(), *keys.split()) == 0
    expected = ops.pseudo_labels(
        people(),
        k1=12,
        k2=4,
        min_samples=3,
        eps=[0.3, 0.6],
        variant="ca-jaccard",
        cameras=cameras,
    )
    with np.load(output) as found:
        assert sorted(found.files) == ["eps", "labels"]
        np.testing.assert_array_equal(found["labels"], expected)
        np.testing.assert_array_equal(found["eps"], [0.3, 0.6])
    lines = capsys.readouterr().out.splitlines()
    for row, line in zip(
        expected, [line for line in lines if line.startswith("  pairs")], strict=True
    ):
        clustered = (row[:, None] == row) & (row >= 0) & ~np.eye(240, dtype=bool)
        same = (IDS[:, None] == IDS) & ~np.eye(240, dtype=bool)
        precision = (clustered & same).sum() / max(clustered.sum(), 1)
        recall = (clustered & same).sum() / same.sum()
        assert line == (
            f"  pairs: {precision:.1%} of those in a cluster are one person, "
            f"{recall:.1%} of those of one person are in a cluster"
        )


def save(path, **arrays):
    if path.suffix == ".npz":
        np.savez(path, **arrays)
    elif path.suffix == ".mat":
        scipy.io.savemat(path, arrays)
    else:
        torch.save({name: torch.tensor(array) for name, array in arrays.items()}, path)


@pytest.mark.parametrize("suffix", [".npz", ".mat", ".pt", ".pth"])
def test_the_key_is_found(tmp_path, suffix):
    path, output = tmp_path / f"f{suffix}", tmp_path / "labels.npy"
    expected = ops.pseudo_labels(people())
    other = {"ids": IDS, "scores": people()[:, 0], "n": np.float64(3)}
    for arrays, key in [
        ({"whatever": people()}, []),
        ({"whatever": people(), **other}, []),
        ({"gallery_f": people(), "query_f": people(30), **other}, []),
        ({"a": people(seed=1), "feat": people(), **other}, []),
        ({"a": people(seed=1), "b": people()}, ["--key", "b"]),
    ]:
        save(path, **arrays)
        assert run("cluster", path, "-o", output, *key) == 0
        np.testing.assert_array_equal(np.load(output), expected)


def test_types_and_layouts(tmp_path):
    x = people()
    for array in (x, x.astype(np.float64), np.asfortranarray(x), x.astype(">f4")):
        np.save(tmp_path / "x.npy", array)
        read = files.matrix(tmp_path, files.read(tmp_path / "x.npy"), None, ())
        assert (read.dtype, read.is_contiguous()) == (torch.float32, True)
        np.testing.assert_array_equal(read.numpy(), x)
    for dtype in (torch.bfloat16, torch.float16):
        torch.save(torch.tensor(x).to(dtype), tmp_path / "x.pt")
        read = files.matrix(tmp_path, files.read(tmp_path / "x.pt"), None, ())
        assert read.dtype == dtype
        torch.testing.assert_close(read, torch.tensor(x).to(dtype), rtol=0, atol=0)


def test_objects_beside_the_features_are_passed_over(tmp_path):
    path, output = tmp_path / "f.npz", tmp_path / "labels.npy"
    np.savez(path, names=np.array(["a", None], object), x=people())
    assert run("cluster", path, "-o", output) == 0


def test_rows_that_are_not_unit_are_pointed_out(tmp_path, features, capsys):
    np.save(features, 3 * people())
    for options, said in [([], True), (["--normalize"], False), (["--variant", "mmt"], False)]:
        assert run("cluster", features, "-o", tmp_path / "labels.npy", *options) == 0
        assert ("takes them to be 1" in capsys.readouterr().err) == said


def test_a_bar_on_a_terminal(tmp_path, features):
    """Below the line of a step, and gone when the step is done."""
    pytest.importorskip("tqdm")
    terminal, end = os.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("4H", 30, 100, 0, 0))
    command = [sys.executable, "-m", "pyreid.cli", "cluster", features, "-o", tmp_path / "o.npy"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=end, text=True, check=True)
    os.close(end)
    with open(terminal, "rb", buffering=0) as said:
        shown = said.read(2**16).decode()
    assert "neighbours of 240 rows" in shown
    assert "  neighbours:   0%|" in shown
    assert "0/240" in shown
    assert done.stdout.startswith("240 rows of 24 features; ")


# --- rerank ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["zhong", "jvtc"])
def test_rerank(tmp_path, capsys, variant):
    queries, gallery = people(20, seed=1), people(90)
    expected = ops.rerank(queries, gallery, 9, 4, 0.2, variant=variant)
    options = ["--k1", 9, "--k2", 4, "--lambda", 0.2, "--variant", variant]
    np.save(tmp_path / "q.npy", queries)
    torch.save(torch.tensor(gallery), tmp_path / "g.pt")
    assert (
        run("rerank", tmp_path / "q.npy", tmp_path / "g.pt", "-o", tmp_path / "d.npy", *options)
        == 0
    )
    np.testing.assert_array_equal(np.load(tmp_path / "d.npy"), expected)
    out, err = (text.splitlines() for text in capsys.readouterr())
    steps = [line.split(" s  ")[1] for line in err]
    assert steps[2:] == [
        *(f"{stage} of 110 rows" for stage in ("neighbours", "jaccard", "distances")), "writing"
    ]  # fmt: skip
    assert out[0] == "20 queries, 90 gallery rows of 24 features"
    assert out[1].startswith(f"distances: smallest {expected.min():.4f}, mean ")
    both = tmp_path / "both.mat"
    scipy.io.savemat(both, {"query_f": queries, "gallery_f": gallery, "query_label": IDS[:20]})
    assert run("rerank", both, both, "-o", tmp_path / "d.npz", *options) == 0
    with np.load(tmp_path / "d.npz") as found:
        np.testing.assert_array_equal(found["distances"], expected)
    np.savez(tmp_path / "other.npz", a=queries, b=gallery)
    keys = ["--queries-key", "a", "--gallery-key", "b"]
    source = tmp_path / "other.npz"
    assert run("rerank", source, source, "-o", tmp_path / "d.npy", *options, *keys) == 0
    np.testing.assert_array_equal(np.load(tmp_path / "d.npy"), expected)


def test_rerank_is_refused(tmp_path, features, capsys):
    narrow, output = tmp_path / "narrow.npy", tmp_path / "d.npy"
    np.save(narrow, people()[:, :5].copy())
    reranking = "'openunreid', 'zhong', 'jvtc' or 'strong-baseline'"
    for arguments, message in [
        ((features, narrow), "rerank: gallery must have shape (any, 24), got (240, 5)"),
        ((features, features, "--lambda", 2), "rerank: lambda_value must lie in [0, 1], got 2.0"),
        ((features, features, "--k1", 0), "rerank: k1 must be at least 1, got 0"),
        (
            (features, features, "--variant", "mmt"),
            f"rerank: variant must be {reranking}, got 'mmt'",
        ),
        ((features, tmp_path / "no.npy"), f"{tmp_path / 'no.npy'}: no such file"),
    ]:
        assert refused(capsys, "rerank", *arguments, "-o", output) == message
    assert sorted(tmp_path.iterdir()) == [features, narrow]


# --- refusals -------------------------------------------------------------------------------------


def test_wrong_options(tmp_path, features, capsys):
    before = features.read_bytes()
    known = "'spcl', 'openunreid', 'zhong', 'mmt', 'jvtc', 'strong-baseline' or 'ca-jaccard'"
    for options, message in [
        (["--k1", 0], "jaccard_graph: k1 must be at least 1, got 0"),
        (["--k2", 0], "jaccard_graph: k2 must be at least 1, got 0"),
        (["--eps", 0], "pseudo_labels: eps must lie in (0, 1], got 0.0"),
        (["--eps", 1.2], "pseudo_labels: eps must lie in (0, 1], got 1.2"),
        (["--eps", "0.5,nan"], "pseudo_labels: eps must lie in (0, 1], got nan"),
        (["--min-samples", 0], "dbscan: min_samples must be at least 1, got 0"),
        (["--variant", "peer"], f"jaccard_graph: variant must be {known}, got 'peer'"),
        (["--variant", "ca-jaccard"],
         "jaccard_graph: cameras must be given for variant 'ca-jaccard', got None"),
        (["--key", "x"], f"{features}: has no key 'x', only a bare array (240, 24)"),
    ]:  # fmt: skip
        output = tmp_path / "labels.npy"
        assert refused(capsys, "cluster", features, "-o", output, *options) == message
        assert list(tmp_path.iterdir()) == [features]
    assert features.read_bytes() == before
    with pytest.raises(SystemExit) as stopped:
        run("cluster", features, "-o", output, "--eps", "0.5;0.6")
    assert stopped.value.code == 2
    message = "argument --eps: must be numbers with commas between them, got '0.5;0.6'"
    assert message in capsys.readouterr().err


def test_wrong_outputs(tmp_path, features, capsys):
    (tmp_path / "folder.npy").mkdir()
    for name, message in [
        ("labels.txt", "name must end in .npy or .npz"),
        ("no/labels.npy", f"there is no folder {tmp_path / 'no'}"),
        ("folder.npy", "is a folder"),
    ]:
        output = tmp_path / name
        assert refused(capsys, "cluster", features, "-o", output) == f"{output}: {message}"
    assert sorted(tmp_path.iterdir()) == [features, tmp_path / "folder.npy"]


def test_wrong_arrays(tmp_path, capsys):
    path = tmp_path / "f.npz"
    damaged = people()
    damaged[17, 3] = np.nan
    two = {"a": people(), "b": people()}
    one = {"x": people(), "ids": IDS, "half": IDS + 0.5}
    shapes = "x (240, 24), ids (240,), half (240,)"
    for arrays, options, message in [
        ({"x": damaged}, [], "x must be finite, got NaN or infinity in row 17"),
        ({"x": np.full((3, 2), 1e300)}, [], "x must be finite, got NaN or infinity in row 0"),
        ({"x": people()[0]}, [], "x must have shape (N, D), got (24,)"),
        ({"x": IDS.reshape(-1, 2)}, [], "x must be of floats, got int64"),
        (two, [], "holds several matrices, name a key: a (240, 24), b (240, 24)"),
        ({"feat": people(), "features": people()}, [],
         "holds several matrices, name a key: feat (240, 24), features (240, 24)"),
        (one, ["--key", "y"], f"has no key 'y', only {shapes}"),
        (one, ["--ids-key", "y"], f"has no key 'y', only {shapes}"),
        (one, ["--ids-key", "half"], "half must hold whole numbers, got others"),
        (one | {"ids": IDS[:9]}, ["--ids-key", "ids"], "ids must hold 240 ids, got 9"),
        ({"x": np.array(["a", None], object)}, [],
         "must hold a matrix of floats, got no array"),
        ({"x": IDS, "y": people()[0]}, [],
         "must hold a matrix of floats, got x (240,), y (24,)"),
    ]:  # fmt: skip
        np.savez(path, **arrays)
        said = refused(capsys, "cluster", path, "-o", tmp_path / "labels.npy", *options)
        assert said == f"{path}: {message}"
        assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pt", ".mat"])
def test_damaged_files(tmp_path, capsys, suffix):
    path, output = tmp_path / f"f{suffix}", tmp_path / "labels.npy"
    if suffix == ".npy":
        np.save(path, people())
    else:
        save(path, x=people())
    whole = path.read_bytes()
    middle = len(whole) // 2
    broken = [b"", b"nonsense" * 40, whole[:middle], whole[:100]]
    if suffix == ".npz":  # guarded by a checksum
        broken.append(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    for content in broken:
        path.write_bytes(content)
        said = refused(capsys, "cluster", path, "-o", output)
        assert said.startswith(f"{path}: ")
        assert "is corrupt" in said
        assert "allow_pickle" not in said
        assert list(tmp_path.iterdir()) == [path]


class Harmful:
    def __reduce__(self):
        return print, ("executed",)


def test_nothing_in_a_file_is_executed(tmp_path, capsys):
    path, output = tmp_path / "f.pt", tmp_path / "labels.npy"
    torch.save({"x": torch.tensor(people()), "y": Harmful()}, path)
    assert refused(capsys, "cluster", path, "-o", output) == (
        f"{path}: must hold tensors only (torch.load with weights_only=True refuses it), or is corrupt"
    )
    path = tmp_path / "f.npy"
    np.save(path, np.array([Harmful()], object), allow_pickle=True)
    said = refused(capsys, "cluster", path, "-o", output)
    assert said == f"{path}: is corrupt or no .npy file: pickled objects are not read"


def test_other_files(tmp_path, capsys, monkeypatch):
    path, output = tmp_path / "f.h5", tmp_path / "labels.npy"
    message = f"{path}: name must end in .npy, .npz, .pt, .pth or .mat"
    assert refused(capsys, "cluster", path, "-o", output) == message
    path = tmp_path / "f.mat"
    path.write_bytes(b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM" + bytes(512))
    assert refused(capsys, "cluster", path, "-o", output) == (
        f"{path}: is corrupt or no .mat file: it is of MATLAB 7.3; save it with -v7"
    )
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    message = f"{path}: reading .mat files takes SciPy: pip install scipy"
    assert refused(capsys, "cluster", path, "-o", output) == message


def test_a_write_that_fails_leaves_what_was_there(tmp_path, features, capsys, monkeypatch):
    output = tmp_path / "labels.npy"
    assert run("cluster", features, "-o", output) == 0
    before = output.read_bytes()

    def full(file, array):
        file.write(b"half of it")
        raise OSError("no space left on device")

    monkeypatch.setattr(np, "save", full)
    capsys.readouterr()
    said = refused(capsys, "cluster", features, "-o", output)
    assert said == "no space left on device"
    assert output.read_bytes() == before
    assert sorted(tmp_path.iterdir()) == [features, output]


def test_cuda_where_there_is_none(tmp_path, features, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    output = tmp_path / "labels.npy"
    said = refused(capsys, "cluster", features, "-o", output, "--device", "cuda")
    assert said.startswith("--device cuda: ")
