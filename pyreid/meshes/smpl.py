"""Bodies that others regressed: a user's own SMPL model in the poses of their HMR, or any mesh they have.

No model comes with the library: SMPL's files are given out by its authors, under their licence.
"""

from __future__ import annotations

import io
import itertools
import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pyreid.data import ANGLES
from pyreid.data.meshes import NameIndex
from pyreid.meshes.raster import mesh_picture, vertex_normals

_SIDE = 224  # pixels of HMR's picture, which the photo is scaled to fit into
_FOCAL = 500.0  # of its camera, in those pixels
_MODEL = ("v_template", "shapedirs", "posedirs", "J_regressor", "kintree_table", "weights", "f")
_FILLED = 0.92  # of the height of a picture, by a mesh without a camera


@dataclass(frozen=True)
class BodyModel:
    """A body as SMPL has it: V vertices, F faces, J joints, S components of shape."""

    template: np.ndarray  # (V, 3)
    shapes: np.ndarray  # (V, 3, S)
    corrections: np.ndarray  # (V, 3, 9 * (J - 1)), by what the joints turn
    regressor: np.ndarray  # (J, V), from vertices to joints
    parents: np.ndarray  # (J,), -1 for the root, else less than the joint's own number
    weights: np.ndarray  # (V, J)
    faces: np.ndarray  # (F, 3) int64

    def vertices(self, pose: np.ndarray, shape: np.ndarray) -> np.ndarray:
        """(V, 3): linear blend skinning.

        Args:
            pose: (J, 3, 3) rotations, or (3 * J,) rotation vectors in radians.
            shape: (K,), of at most S components.
        """
        joints = len(self.parents)
        pose = np.asarray(pose, np.float64)
        turns = pose if pose.shape == (joints, 3, 3) else from_vectors(pose.reshape(joints, 3))
        rest = self.template + self.shapes[..., : len(shape)] @ shape
        where = self.regressor @ rest
        rest = rest + self.corrections @ (turns[1:] - np.eye(3)).ravel()
        world = np.zeros((joints, 4, 4))
        for joint, parent in enumerate(self.parents):
            local = np.eye(4)
            local[:3, :3] = turns[joint]
            local[:3, 3] = where[joint] - (where[parent] if parent >= 0 else 0)
            world[joint] = world[parent] @ local if parent >= 0 else local
        moves = world[:, :3, 3] - np.einsum("jab,jb->ja", world[:, :3, :3], where)
        blended = np.einsum("vj,jab->vab", self.weights, world[:, :3, :3])
        return np.einsum("vab,vb->va", blended, rest) + self.weights @ moves


def from_vectors(vectors: np.ndarray) -> np.ndarray:
    """(..., 3) rotation vectors in radians -> (..., 3, 3) (Rodrigues)."""
    angle = np.linalg.norm(vectors, axis=-1, keepdims=True)[..., None]
    x, y, z = np.moveaxis(vectors, -1, 0)
    zero = np.zeros_like(x)
    cross = np.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).reshape(*x.shape, 3, 3)
    small = angle < 1e-8
    safe = np.where(small, 1, angle)
    first = np.where(small, 1, np.sin(safe) / safe)
    second = np.where(small, 0.5, (1 - np.cos(safe)) / safe**2)
    return np.eye(3) + first * cross + second * (cross @ cross)


def read_model(path: str | os.PathLike[str]) -> BodyModel:
    """A body model in SMPL's form: .npz, or .pkl as its authors give it out, of which nothing is executed."""
    path = Path(path)
    arrays = _read(path)
    if missing := [key for key in _MODEL if key not in arrays]:
        raise ValueError(f"{path}: is no SMPL model: it has no {', '.join(missing)}")
    parents = np.asarray(arrays["kintree_table"]).astype(np.int64)[0]
    parents[0] = -1
    template, weights = _floats(arrays["v_template"]), _floats(arrays["weights"])
    vertices, joints = weights.shape
    model = BodyModel(
        template=template,
        shapes=_floats(arrays["shapedirs"]),
        corrections=_floats(arrays["posedirs"]).reshape(vertices, 3, -1),
        regressor=_floats(arrays["J_regressor"]),
        parents=parents,
        weights=weights,
        faces=np.asarray(arrays["f"]).astype(np.int64),
    )
    shapes = {
        "v_template": (model.template, (vertices, 3)),
        "posedirs": (model.corrections, (vertices, 3, 9 * (joints - 1))),
        "J_regressor": (model.regressor, (joints, vertices)),
        "kintree_table": (parents, (joints,)),
    }
    for key, (array, wanted) in shapes.items():
        if array.shape != wanted:
            raise ValueError(f"{path}: {key} must have shape {wanted}, got {array.shape}")
    if (parents[1:] >= np.arange(1, joints)).any() or (parents[1:] < 0).any():
        raise ValueError(f"{path}: kintree_table must give each joint a parent before it")
    return model


@dataclass(frozen=True)
class Bodies:
    """What a regressor found in photos: a model, and for each photo its pose, shape and camera.

    The camera is HMR's (s, tx, ty), of the photo scaled so that its longer side is 224 pixels and padded to a
    square around its middle.
    """

    model: BodyModel
    names: tuple[str, ...]
    poses: np.ndarray  # (N, J, 3, 3) or (N, 3 * J)
    shapes: np.ndarray  # (N, K)
    cameras: np.ndarray  # (N, 3)

    def rows(self, names: tuple[str, ...]) -> list[int | None]:
        """Where photos are; None: not here. See `pyreid.data.open_meshes` for how names are matched."""
        index = NameIndex({name: row for row, name in enumerate(self.names)})
        return [index.find(name) for name in names]

    def turns(self, row: int, *, size: tuple[int, int], height: int, width: int) -> np.ndarray:
        """(8, height, width) uint8: the body in a photo of `size` (width, height), and turned to its left by
        45 to 315 degrees, about the vertical through its middle."""
        vertices = self.model.vertices(self.poses[row], self.shapes[row])
        s, x, y = self.cameras[row].tolist()
        vertices += (x, y, _FOCAL / (0.5 * _SIDE * s))  # x to the right, y down, z away
        scale = max(size) / _SIDE
        middle, faces = vertices.mean(axis=0), self.model.faces
        normals = vertex_normals(vertices, self.model.faces) * (1, -1, -1)
        views = []
        for angle in np.radians(ANGLES):
            turned = (vertices - middle) @ about_y(-angle).T + middle
            nearness = 1 / np.maximum(turned[:, 2], 1e-3)
            points = turned[:, :2] * (_FOCAL * scale * nearness[:, None])
            points = (points / size + 0.5) * (width, height)
            views.append(
                mesh_picture(points, nearness, normals @ about_y(angle).T, faces, height, width)
            )
        return np.stack(views)


def read_bodies(model: str | os.PathLike[str], poses: str | os.PathLike[str]) -> Bodies:
    """A model (`read_model`), and what a regressor found in N photos: a .npz, or a .pkl, of which nothing is
    executed. It holds names (N,), pose (N, 72), (N, 24, 3) or (N, 24, 3, 3), shape (N, 10) and camera (N, 3),
    also as poses, betas or cam."""
    body = read_model(model)
    path = Path(poses)
    arrays = _read(path)
    found = {}
    for key, others in {
        "names": ("image_names", "imgnames", "imgname", "files"),
        "pose": ("poses", "pred_pose", "theta"),
        "shape": ("shapes", "betas", "pred_betas", "beta"),
        "camera": ("cameras", "cam", "cams", "pred_cam", "pred_camera"),
    }.items():
        known = next((name for name in (key, *others) if name in arrays), None)
        if known is None:
            raise ValueError(f"{path}: must hold {key}, got {', '.join(arrays) or 'nothing'}")
        found[key] = np.asarray(arrays[known])
    names, joints = tuple(str(name) for name in found["names"].tolist()), len(body.parents)
    count = len(names)
    pose, shape, camera = (_floats(found[key]) for key in ("pose", "shape", "camera"))
    if pose.shape[:1] != (count,) or pose[:1].size not in (3 * joints * min(count, 1), 9 * joints):
        raise ValueError(
            f"{path}: pose must have shape ({count}, {3 * joints}) or ({count}, {joints}, 3, 3), "
            f"got {pose.shape}"
        )
    if shape.ndim != 2 or len(shape) != count or shape.shape[1] > body.shapes.shape[2]:
        raise ValueError(
            f"{path}: shape must have shape ({count}, {body.shapes.shape[2]}) or less, got {shape.shape}"
        )
    if camera.shape != (count, 3) or (camera[:, 0] <= 0).any():
        raise ValueError(
            f"{path}: camera must be ({count}, 3): a positive scale, x and y; got {camera.shape}"
        )
    if pose.size == 9 * joints * count:
        pose = pose.reshape(count, joints, 3, 3)
    return Bodies(body, names, pose.reshape(count, *pose.shape[1:]), shape, camera)


def mesh_turns(
    vertices: np.ndarray, faces: np.ndarray, *, height: int, width: int, aspect: float | None = None
) -> np.ndarray:
    """(8, height, width) uint8: any closed mesh, such as `read_obj` or another body model gives, from head to
    foot in the middle of the picture; and turned to its left about the vertical.

    Args:
        vertices: (V, 3), x to the right, y up, z to the viewer.
        faces: (F, 3), counter-clockwise from outside.
        aspect: of the photo that the picture stands for, its width over its height. Default: the picture's.
    """
    low, high = vertices.min(axis=0), vertices.max(axis=0)
    tall = (high[1] - low[1]) / _FILLED
    per_metre = np.array([width / (tall * (aspect or width / height)), -height / tall])
    vertices = vertices - (low + high) / 2
    normals = vertex_normals(vertices, faces)
    views = []
    for angle in np.radians(ANGLES):
        turned = vertices @ about_y(angle).T
        points = turned[:, :2] * per_metre + (width / 2, height / 2)
        turned_normals = normals @ about_y(angle).T
        views.append(mesh_picture(points, turned[:, 2], turned_normals, faces, height, width))
    return np.stack(views)


def read_obj(path: str | os.PathLike[str]) -> tuple[np.ndarray, np.ndarray]:
    """Vertices (V, 3) and triangles (F, 3) of an OBJ file; faces of more corners become fans."""
    vertices, faces = [], []
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            kind, *fields = line.split("#")[0].split() or [""]
            try:
                if kind == "v":
                    vertices.append([float(field) for field in fields[:3]])
                elif kind == "f":
                    corners = [int(field.split("/")[0]) for field in fields]
                    corners = [at - 1 if at > 0 else len(vertices) + at for at in corners]
                    faces += [(corners[0], *pair) for pair in itertools.pairwise(corners[1:])]
            except ValueError:
                raise ValueError(f"{path}: line {number} is no line of an OBJ file") from None
    triangles = np.array(faces, np.int64).reshape(-1, 3)
    if not faces or triangles.min() < 0 or triangles.max() >= len(vertices):
        raise ValueError(f"{path}: must hold vertices, and faces of them")
    return np.array(vertices), triangles


def about_y(angle: float) -> np.ndarray:
    """(3, 3): what faces the viewer turns to the right of the picture; x to the right, z to the viewer."""
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])


# --- Files of others


def _read(path: Path) -> dict[str, Any]:
    """Arrays by name. Pickled objects are not made but for arrays; those of .npz files are not read."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        if path.suffix.lower() == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return {key: arrays[key] for key in arrays.files}
        found = _Arrays(io.BytesIO(path.read_bytes()), encoding="latin1").load()
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path}: {error}; save the arrays as .npz") from None
    except Exception as error:  # what a damaged file makes readers raise
        raise ValueError(f"{path}: is corrupt or no .npz or .pkl file: {error}") from None
    if not isinstance(found, Mapping):
        raise ValueError(f"{path}: must hold a dictionary of arrays, got {type(found).__name__}")
    return {
        str(key): value.array() if isinstance(value, _Kept) else value
        for key, value in found.items()
    }


class _Kept:
    """In place of an object of a library that SMPL's files were written with: what it holds."""

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def array(self) -> np.ndarray:
        raise NotImplementedError


class _Variable(_Kept):
    """Of chumpy."""

    def array(self) -> np.ndarray:
        if "x" not in self.state:
            raise ValueError("an array is kept as a chumpy expression: save it as plain NumPy")
        return np.asarray(self.state["x"])


class _Columns(_Kept):
    """A sparse matrix of SciPy, column by column."""

    def array(self) -> np.ndarray:
        shape = self.state.get("_shape", self.state.get("shape"))
        dense = np.zeros(shape)
        owner = np.repeat(np.arange(len(self.state["indptr"]) - 1), np.diff(self.state["indptr"]))
        self._add(dense, owner)
        return dense

    def _add(self, dense: np.ndarray, owner: np.ndarray) -> None:
        np.add.at(dense, (self.state["indices"], owner), self.state["data"])


class _Rows(_Columns):
    """Likewise, row by row."""

    def _add(self, dense: np.ndarray, owner: np.ndarray) -> None:
        np.add.at(dense, (owner, self.state["indices"]), self.state["data"])


class _Arrays(pickle.Unpickler):
    """Makes arrays and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        top = module.split(".")[0]
        if name in ("_reconstruct", "scalar") and module in (
            "numpy.core.multiarray",
            "numpy._core.multiarray",
        ):
            return super().find_class("numpy._core.multiarray", name)
        if name == "_frombuffer" and module in ("numpy.core.numeric", "numpy._core.numeric"):
            return super().find_class("numpy._core.numeric", name)
        if (module, name) in {
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("_codecs", "encode"),
            ("copyreg", "_reconstructor"),
            ("copy_reg", "_reconstructor"),
            ("builtins", "object"),
            ("__builtin__", "object"),
        }:
            return super().find_class(module.replace("copy_reg", "copyreg"), name)
        if top == "chumpy" and name == "Ch":
            return _Variable
        if top == "scipy" and name in ("csc_matrix", "csr_matrix"):
            return _Columns if name == "csc_matrix" else _Rows
        raise pickle.UnpicklingError(f"it holds a {module}.{name}, which is not read")


def _floats(array: Any) -> np.ndarray:
    array = np.asarray(array)
    if array.dtype.kind not in "fiu":
        raise ValueError(f"smpl: arrays must be of numbers, got {array.dtype}")
    return array.astype(np.float64)
