"""Small projects with the module names of real ones, and scripts that import from them as real scripts do;
run as they are and under pyreid.compat."""

import contextlib
import runpy
import sys

import torch

from pyreid.compat import __main__ as command
from pyreid.compat import openunreid

FAISS = "METRIC_L2 = 1\n"  # what `import faiss` needs where nothing stands in for it


def write(root, files):
    """A tree of modules; every folder becomes a package."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = path.parent
        while folder != root:
            (folder / "__init__.py").touch()
            folder = folder.parent
        path.write_text(text)


@contextlib.contextmanager
def importable(root, *packages):
    """`root` on the path; modules of these packages are forgotten before and after."""

    def forget():
        for name in list(sys.modules):
            if name.split(".")[0] in packages:
                del sys.modules[name]

    forget()
    sys.path.insert(0, str(root))
    try:
        yield
    finally:
        sys.path.remove(str(root))
        forget()


def outcome(root, script, package, *options, project=None):
    """What `script` saves at the path that it is given: alone, or under `python -m pyreid.compat`."""
    (root / "train.py").write_text(script)
    saved = root / "saved.pt"
    saved.unlink(missing_ok=True)
    before = sys.argv[:]
    with importable(root, package, "faiss"):
        if project is None:
            write(root / "plain", {"faiss.py": FAISS})
            with importable(root / "plain"):
                sys.argv = ["train.py", str(saved)]
                try:
                    runpy.run_path(str(root / "train.py"), run_name="__main__")
                finally:
                    sys.argv = before
        else:
            command.main([*options, project, str(root / "train.py"), str(saved)])
    return torch.load(saved, weights_only=True)


def same(plain, ours):
    """Labels equal, the rest within float tolerance."""
    assert plain.keys() == ours.keys()
    for name, expected in plain.items():
        if expected.dtype == torch.int64:
            assert torch.equal(ours[name], expected), name
        else:
            torch.testing.assert_close(ours[name], expected, rtol=1e-5, atol=1e-5, msg=name)


def people(count, pictures, dim, *, seed, spread=0.35):
    """(N, D) unit features: some clear clusters, some that touch, and a few that stand alone."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(count, 1, dim, generator=generator)
    near = centres + spread * torch.randn(count, pictures, dim, generator=generator)
    alone = torch.randn(count // 2, dim, generator=generator)
    return torch.nn.functional.normalize(torch.cat([near.reshape(-1, dim), alone]))


def rank_of_two(rank, place, results):
    """OpenUnReID's memory in one of two processes: what a step leaves of the bank, and the gradient."""
    torch.set_num_threads(1)
    where = {"init_method": f"file://{place}", "rank": rank, "world_size": 2}
    torch.distributed.init_process_group("gloo", **where)
    memory = openunreid.HybridMemory(16, 33)
    memory._update_feature(people(6, 5, 16, seed=1))
    memory._update_label(torch.arange(33) // 4)
    mine = slice(3 * rank, 3 * rank + 3)
    inputs = torch.randn(6, 16, generator=torch.Generator().manual_seed(2))
    x = inputs[mine].requires_grad_()
    memory({"feat": x}, torch.tensor([5, 5, 6, 0, 5, 30])[mine]).backward()
    results.put((rank, memory.features.numpy(), x.grad.numpy()))
    torch.distributed.destroy_process_group()
