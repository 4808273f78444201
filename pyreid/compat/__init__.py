"""Other people's trainers on our ops: their names, signatures and conventions, one module per project.

`pyreid.compat.<project>` holds what to import in place of theirs. `patch(project)` swaps it into a program
that stays as it is, says what it swapped, and undoes it; `python -m pyreid.compat PROJECT SCRIPT [ARGS...]`
runs a script that way.

What a project's module defines for `patch`:

    REPLACEMENTS  "their.module.name" -> our object; or a class's attribute, "their.module.Class.name".
    SPARSE        the same, added (and preferred) where `sparse` is asked for. Optional.
    ABSENT        names of packages that theirs import but ours do without: where one is not installed, an
                  empty stand-in lets `import` pass. Optional.
"""

from __future__ import annotations

import importlib
import pkgutil
import re

from pyreid.compat._patch import Patched, renamed

__all__ = ["Patched", "patch", "projects"]

# Other spellings, where hyphens, underscores and capitals are not all that differs.
_ALIASES = {
    "selfpacedcontrastivelearning": "spcl",
    "clustercontrastreid": "cluster_contrast",
    "deeppersonreid": "torchreid",
    "reidstrongbaseline": "strong_baseline",
    "transreid": "strong_baseline",
    "personreidbaselinepytorch": "person_reid_baseline",
    "pml": "pytorch_metric_learning",
    "oml": "open_metric_learning",
}


def projects() -> list[str]:
    """The projects that `patch` knows."""
    return [name for _, name, _ in pkgutil.iter_modules(__path__) if not name.startswith("_")]


def patch(
    project: str, *, sparse: bool = True, quiet: bool = False, package: str | None = None
) -> Patched:
    """Puts ours in the place of a project's own functions and classes, in this process, until undone.

    Modules that are imported already are changed, and so are names that other modules hold of them
    (`from spcl.utils.faiss_rerank import compute_jaccard_distance` in a script); the rest is changed as it
    is imported. Objects that exist already, such as a memory made before, stay what they are: patch before
    the trainer is built.

    Args:
        project: one of `projects()`; capitals, hyphens and underscores do not matter.
        sparse: where a project's next step is DBSCAN, distances are handed on as a sparse graph that stands
            in for the N x N array. False: NumPy arrays, as theirs.
        quiet: do not say what is replaced (on stderr).
        package: the name of the package to change, where it is a fork with the project's modules under
            another name.

    Returns:
        Patched: `.replaced`, `.waiting`, `.undo()`; as a context manager, undone at the end of its block.
    """
    known = projects()
    wanted = _plain(project)
    wanted = _plain(_ALIASES.get(wanted, wanted))
    names = [name for name in known if _plain(name) == wanted]
    if not names:
        raise ValueError(f"patch: project must be one of {', '.join(known)}, got {project!r}")
    module = importlib.import_module(f"{__name__}.{names[0]}")
    ours = dict(module.REPLACEMENTS)
    if sparse:
        ours |= getattr(module, "SPARSE", {})
    if package is not None:
        ours = {renamed(target, package): replacement for target, replacement in ours.items()}
    patched = Patched(names[0], ours, getattr(module, "ABSENT", ()))
    if not quiet:
        patched.say()
    return patched


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
