"""Swapping functions in a running program: what is replaced where and when, what is said, and that it is
undone. And the stand-in for an N x N array, against the array."""

import itertools
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import trainers
import transcribed
from hypothesis import given
from hypothesis import strategies as st
from sklearn import cluster

from pyreid import compat, ops
from pyreid.compat import __main__ as command
from pyreid.compat import gcl, ice, spcl
from pyreid.compat._patch import Patched
from pyreid.compat._sparse import DBSCAN, SparseDistance

OWN = ["cluster_contrast", "gcl", "ice", "mmt", "openunreid", "spcl"]
MODULES = {
    "ice/utils/faiss_rerank.py": "def compute_jaccard_distance(features):\n    return 'theirs'\n",
    "ice/trainers.py": """
from .utils.faiss_rerank import compute_jaccard_distance

class ImageTrainer:
    def _update_ema_variables(self, model, ema_model, alpha, global_step):
        return "theirs"
""",
}


@pytest.fixture
def project(tmp_path):
    trainers.write(tmp_path, MODULES)
    with trainers.importable(tmp_path, "ice", "holder", "faiss"):
        yield tmp_path


def module(name, **contents):
    made = types.ModuleType(name)
    vars(made).update(contents)
    sys.modules[name] = made
    return made


def test_projects():
    assert set(OWN) <= set(compat.projects())


@pytest.mark.parametrize(
    "name, found",
    [
        ("spcl", "spcl"),
        ("SpCL", "spcl"),
        ("cluster-contrast", "cluster_contrast"),
        ("cluster_contrast", "cluster_contrast"),
        ("ClusterContrast", "cluster_contrast"),
        ("cluster-contrast-reid", "cluster_contrast"),
        ("OpenUnReID", "openunreid"),
    ],
)
def test_names(name, found):
    with compat.patch(name, quiet=True) as patched:
        assert patched.project == found


def test_unknown_project():
    with pytest.raises(ValueError) as error:
        compat.patch("clip-reid")
    known = ", ".join(compat.projects())
    assert str(error.value) == f"patch: project must be one of {known}, got 'clip-reid'"


@pytest.mark.parametrize("name", OWN)
def test_what_a_project_replaces_is_ours(name):
    replaced = __import__(f"pyreid.compat.{name}", fromlist=["REPLACEMENTS"])
    tables = (replaced.REPLACEMENTS, replaced.SPARSE)
    for target, ours in itertools.chain.from_iterable(table.items() for table in tables):
        assert ours.__module__.startswith("pyreid.")
        assert "." in target
    assert all(hasattr(replaced, public) for public in replaced.__all__)


@pytest.mark.parametrize("name", OWN)
def test_a_page_names_what_is_replaced(name):
    page = (Path(__file__).parents[1] / f"docs/compat/{name}.md").read_text()
    replaced = __import__(f"pyreid.compat.{name}", fromlist=["REPLACEMENTS"])
    for target in {**replaced.REPLACEMENTS, **replaced.SPARSE}:
        module, attribute = target.rsplit(".", 1)
        assert attribute in page, target
        assert module in page, target
    assert f"from pyreid.compat.{name} import " in page
    assert f"({name}.md)" in (Path(__file__).parents[1] / "docs/compat/README.md").read_text()


def test_modules_to_come(project):
    with compat.patch("ice", quiet=True) as patched:
        assert "ice.utils.faiss_rerank.compute_jaccard_distance" in patched.waiting
        from ice.trainers import ImageTrainer, compute_jaccard_distance

        assert compute_jaccard_distance.__module__ == "pyreid.compat._jaccard"
        assert ImageTrainer._update_ema_variables is ice.update_ema_variables
        assert "ice.trainers.ImageTrainer._update_ema_variables" in patched.replaced
        assert "ice.utils.faiss_rerank.compute_jaccard_distance" not in patched.waiting
        loader = sys.modules["ice.trainers"].__spec__.loader
        assert type(loader).__module__.endswith("importlib_external")
        assert sys.modules["ice.trainers"].__loader__ is loader
    trainer = sys.modules["ice.trainers"]
    assert trainer.compute_jaccard_distance(None) == "theirs"
    assert trainer.ImageTrainer()._update_ema_variables(None, None, 0, 0) == "theirs"
    assert patched.replaced == {}


def test_modules_that_are_there(project):
    from ice.trainers import ImageTrainer
    from ice.utils import faiss_rerank

    theirs = faiss_rerank.compute_jaccard_distance
    holder = module("holder", jaccard=theirs, other=theirs)
    patched = compat.patch("ice", sparse=False, quiet=True)
    assert holder.jaccard is holder.other is spcl.compute_jaccard_distance
    assert faiss_rerank.compute_jaccard_distance is spcl.compute_jaccard_distance
    assert sys.modules["ice.trainers"].compute_jaccard_distance is spcl.compute_jaccard_distance
    assert "holder.jaccard" in patched.replaced
    assert ImageTrainer._update_ema_variables is ice.update_ema_variables
    patched.undo()
    patched.undo()
    assert holder.jaccard is holder.other is theirs
    assert sys.modules["ice.trainers"].compute_jaccard_distance is theirs
    assert ImageTrainer()._update_ema_variables(None, None, 0, 0) == "theirs"


def test_a_fork(tmp_path):
    files = {name.replace("ice/", "forked/"): text for name, text in MODULES.items()}
    trainers.write(tmp_path, files)
    with trainers.importable(tmp_path, "forked"), compat.patch("ice", quiet=True, package="forked"):
        trainer = __import__("forked.trainers", fromlist=["ImageTrainer"])
        assert trainer.ImageTrainer._update_ema_variables is ice.update_ema_variables
        assert trainer.compute_jaccard_distance.__module__.startswith("pyreid.compat.")
        assert cluster.DBSCAN is DBSCAN


def test_scikit_learn_keeps_its_own():
    theirs = cluster.DBSCAN
    inside = sys.modules["sklearn.cluster._dbscan"]
    with compat.patch("spcl", quiet=True):
        assert cluster.DBSCAN is DBSCAN
        assert inside.DBSCAN is theirs
        points = np.array([[0.0], [0.1], [5.0]])
        np.testing.assert_array_equal(
            cluster.DBSCAN(0.5, min_samples=2).fit_predict(points), [0, 0, -1]
        )
    assert cluster.DBSCAN is theirs


def test_one_within_another(project):
    from ice.utils import faiss_rerank

    theirs = faiss_rerank.compute_jaccard_distance, cluster.DBSCAN
    outer = compat.patch("ice", quiet=True)
    inner = compat.patch("gcl", quiet=True)
    holder = module("holder", jaccard=faiss_rerank.compute_jaccard_distance)
    inner.undo()
    assert faiss_rerank.compute_jaccard_distance is holder.jaccard is not theirs[0]
    assert cluster.DBSCAN is DBSCAN
    outer.undo()
    assert holder.jaccard is theirs[0]
    assert (faiss_rerank.compute_jaccard_distance, cluster.DBSCAN) == theirs


def test_an_error_undoes(project):
    from ice.utils import faiss_rerank

    theirs = faiss_rerank.compute_jaccard_distance
    with pytest.raises(KeyError), compat.patch("ice", quiet=True):
        raise KeyError
    assert faiss_rerank.compute_jaccard_distance is theirs


def test_what_it_says(project, capsys):
    with compat.patch("ice") as patched:
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err == f"{patched}\n"
        lines = said.err.splitlines()
        assert lines[0] == "pyreid.compat: ice"
        ours = "pyreid.compat._sparse.DBSCAN"
        assert f"  sklearn.cluster.DBSCAN -> {ours}" in lines
        assert f"  {__name__}.DBSCAN -> {ours}" not in lines
        target = "ice.trainers.ImageTrainer._update_ema_variables"
        assert f"  {target} -> pyreid.compat.ice.update_ema_variables, when imported" in lines


def test_a_module_without_the_name_is_left_alone(project):
    trainers.write(project, {"ice/loss/contrastive.py": "SOMETHING = 1\n"})
    with compat.patch("ice", quiet=True) as patched:
        __import__("ice.loss.contrastive")
        assert "ice.loss.contrastive.ViewContrastiveLoss" in patched.waiting


def test_stand_in_for_an_absent_package(tmp_path):
    uses = """
import absent_search

def look(metric=absent_search.METRIC_L2):
    absent_search.search(metric)
"""
    trainers.write(tmp_path, {"holder.py": uses})
    with trainers.importable(tmp_path, "holder", "absent_search"):
        with Patched("holder", {}, ("absent_search",)):
            from holder import look

            with pytest.raises(
                ImportError, match=r"^absent_search\.search is called, but absent_se"
            ):
                look()
        assert "absent_search" not in sys.modules
        with pytest.raises(ModuleNotFoundError):
            __import__("absent_search")


def test_no_stand_in_for_what_is_installed(tmp_path):
    trainers.write(tmp_path, {"faiss.py": "VERSION = 7\n"})
    with trainers.importable(tmp_path, "faiss"), compat.patch("spcl", quiet=True):
        assert __import__("faiss").VERSION == 7


def test_command(project):
    """In a process of its own: the script's arguments, its folder on the path, and what is said."""
    script = project / "train.py"
    script.write_text(
        "import sys\nfrom ice.utils.faiss_rerank import compute_jaccard_distance\n"
        "print(__name__, sys.argv[1:], compute_jaccard_distance.__name__)\n"
    )
    arguments = ["--package", "ice", "ice", str(script), "--epochs", "3", "-b", "4"]
    run = [sys.executable, "-m", "pyreid.compat", *arguments]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    assert done.stdout == "__main__ ['--epochs', '3', '-b', '4'] sparse_jaccard_distance\n"
    assert done.stderr.startswith("pyreid.compat: ice\n")


def test_command_for_a_script_that_is_the_first_to_import_scikit_learn(tmp_path):
    """As released scripts are. In a process of its own, for here it has been imported."""
    script = tmp_path / "train.py"
    script.write_text("from sklearn.cluster import DBSCAN\nprint(DBSCAN.__module__)\n")
    run = [sys.executable, "-m", "pyreid.compat", "--quiet", "spcl", str(script)]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    assert done.stdout == "pyreid.compat._sparse\n"


def test_parts_that_a_package_imports_when_asked_for(tmp_path):
    """`package.part` by the package's own __getattr__, as scikit-learn and SciPy have it."""
    package = "import importlib\n\ndef __getattr__(name):\n"
    package += "    return importlib.import_module('ice.' + name)\n"
    parts = "from .faiss_rerank import compute_jaccard_distance\n"
    files = {"ice/__init__.py": package, "ice/utils/__init__.py": parts}
    files["ice/utils/faiss_rerank.py"] = MODULES["ice/utils/faiss_rerank.py"]
    trainers.write(tmp_path, files)
    with trainers.importable(tmp_path, "ice"), compat.patch("ice", quiet=True) as patched:
        __import__("ice")
        assert "ice.utils" not in sys.modules
        from ice.utils import compute_jaccard_distance

        assert compute_jaccard_distance.__module__ == "pyreid.compat._jaccard"
        assert "ice.utils.faiss_rerank.compute_jaccard_distance" in patched.replaced


def test_command_that_replaces_nothing(tmp_path, capsys):
    (tmp_path / "train.py").write_text("print('trained')\n")
    before = sys.argv[:], sys.path[:]
    command.main(["spcl", str(tmp_path / "train.py")])
    assert (sys.argv, sys.path) == before
    said = capsys.readouterr()
    assert said.out == "trained\n"
    last = "pyreid.compat: the script imported nothing of spcl that is replaced"
    assert said.err.splitlines()[-1] == last
    command.main(["--quiet", "spcl", str(tmp_path / "train.py")])
    assert capsys.readouterr().err == ""


def test_command_for_an_unknown_project(capsys):
    with pytest.raises(SystemExit):
        command.main(["clip-reid", "train.py"])
    assert "patch: project must be one of" in capsys.readouterr().err


# --- the stand-in ---------------------------------------------------------------------------------


def both(seed, people=6, pictures=6, k1=8, k2=3):
    features = trainers.people(people, pictures, 12, seed=seed, spread=0.5)
    dense = ops.jaccard_distance(features, k1, k2).numpy()
    return dense, SparseDistance(ops.jaccard_graph(features, k1, k2))


def test_stand_in_is_the_array():
    dense, sparse = both(0)
    assert sparse.shape == dense.shape
    assert (len(sparse), sparse.size, sparse.ndim) == (len(dense), dense.size, 2)
    assert sparse.dtype == dense.dtype
    assert sparse.nbytes < dense.nbytes * 3
    for key in (0, -1, slice(3, 5), (slice(None), 2), np.array([4, 4, 1])):
        np.testing.assert_array_equal(sparse[key], dense[key])
    with pytest.raises(IndexError):
        sparse[len(dense)]
    np.testing.assert_array_equal(np.asarray(sparse, np.float64), dense.astype(np.float64))
    np.testing.assert_array_equal(np.minimum(dense, np.array(sparse)), dense)
    np.testing.assert_array_equal(np.concatenate([sparse, dense]), np.concatenate([dense, dense]))
    np.testing.assert_array_equal(np.triu(sparse), np.triu(dense))
    np.testing.assert_array_equal(np.triu(sparse, k=2), np.triu(dense, k=2))
    assert np.sum(sparse) == np.sum(dense)
    assert sparse.numpy() is sparse
    assert repr(sparse).startswith("SparseDistance(shape=(39, 39), ")
    with pytest.raises(ValueError, match="copy must not be False"):
        np.array(sparse, copy=False)


def test_what_was_cut_is_for_dbscan_alone():
    features = trainers.people(6, 6, 12, seed=0, spread=0.5)
    whole = spcl.compute_jaccard_distance(features, 8, 3, False, sparse=True)
    cut = spcl.compute_jaccard_distance(features, 8, 3, False, sparse=True, max_distance=0.6)
    assert len(cut.indices) < len(whole.indices)
    labels = [DBSCAN(eps=0.6, metric="precomputed").fit_predict(each) for each in (whole, cut)]
    np.testing.assert_array_equal(*labels)
    message = "SparseDistance: max_distance must be None for a dense array, got 0.6"
    for use in (np.asarray, lambda d: d[0], lambda d: transcribed.rho_eps(d, 0.1)):
        with pytest.raises(ValueError) as error:
            use(cut)
        assert str(error.value) == message
    with pytest.raises(ValueError, match=r"^dbscan: eps must be at most 0\.6"):
        DBSCAN(eps=0.7, metric="precomputed").fit(cut)


def test_triangle_and_its_values():
    dense, sparse = both(1)
    triangle, expected = np.triu(sparse, 1), np.triu(dense, 1)
    np.testing.assert_array_equal(np.asarray(triangle), expected)
    np.testing.assert_array_equal(triangle[expected > 0.5], expected[expected > 0.5])
    assert np.count_nonzero(triangle) == np.count_nonzero(expected)
    for ours, theirs in zip(np.nonzero(triangle), np.nonzero(expected), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    values, wanted = triangle[np.nonzero(triangle)], expected[np.nonzero(expected)]
    assert (len(values), values.size, values.shape, values.ndim) == (
        *[len(wanted)] * 2,
        wanted.shape,
        1,
    )
    assert np.mean(values) == pytest.approx(wanted.mean(), rel=1e-6)
    ours, theirs = np.sort(values, axis=None), np.sort(wanted, axis=None)
    for key in (
        slice(7),
        slice(None),
        slice(-3, None),
        slice(2, 90, 7),
        slice(None, None, -1),
        slice(9, 2, -2),
        slice(len(wanted) - 2),
        0,
        -1,
    ):
        np.testing.assert_array_equal(ours[key], theirs[key])


@given(st.integers(0, 10**6), st.integers(0, 20), st.integers(1, 6))
def test_dbscan_is_scikit_learns(seed, twentieths, min_samples):
    dense, sparse = both(seed % 50)
    eps = max(twentieths / 20, 1e-6)
    theirs = cluster.DBSCAN(eps=eps, min_samples=min_samples, metric="precomputed").fit(dense)
    for distance in (dense, sparse):
        ours = DBSCAN(eps=eps, min_samples=min_samples, metric="precomputed").fit(distance)
        np.testing.assert_array_equal(ours.labels_, theirs.labels_)
        np.testing.assert_array_equal(ours.core_sample_indices_, theirs.core_sample_indices_)


def test_dbscan_is_used_as_an_estimator():
    dense, sparse = both(2)
    ours, theirs = DBSCAN(metric="precomputed"), cluster.DBSCAN(metric="precomputed")
    assert ours.get_params() == theirs.get_params()
    with pytest.raises(ValueError):
        ours.set_params(epsilon=1)
    weights = np.linspace(0, 2, len(dense))
    for each in (ours, theirs):
        each.set_params(eps=0.6, min_samples=3)
        each.fit(dense, sample_weight=weights)
    np.testing.assert_array_equal(ours.labels_, theirs.labels_)
    np.testing.assert_array_equal(ours.core_sample_indices_, theirs.core_sample_indices_)
    with pytest.raises(ValueError) as error:
        DBSCAN(eps=0.5).fit(sparse)
    assert str(error.value) == (
        "DBSCAN: metric must be 'precomputed' for distances, got 'euclidean'"
    )
    lists = dense.tolist()
    same = DBSCAN(eps=0.6, min_samples=3, metric="precomputed").fit_predict(lists)
    np.testing.assert_array_equal(
        same, cluster.DBSCAN(eps=0.6, min_samples=3, metric="precomputed").fit_predict(dense)
    )


def test_our_rule_for_eps_takes_the_stand_in():
    dense, sparse = both(3)
    assert gcl.eps_from_rho(sparse, 0.1) == gcl.eps_from_rho(dense, 0.1)
    assert torch.equal(
        torch.from_numpy(ops.dbscan(dense, 0.6)), torch.as_tensor(ops.dbscan(sparse, 0.6))
    )
