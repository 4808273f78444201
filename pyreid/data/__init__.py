"""Images in, batches out: image sets, the folders they come in, transforms, samplers, batches."""

try:
    import PIL  # noqa: F401
except ImportError:
    raise ImportError("pyreid.data takes Pillow: pip install 'pyreid[train]'") from None

from pyreid.data.batches import Batch, batches, images_in_order
from pyreid.data.images import (
    ImageArrays,
    ImageError,
    ImageFiles,
    Images,
    ReidData,
    as_images,
    readable,
)
from pyreid.data.layouts import LAYOUTS, frame_numbers, open_csv, open_data, open_folder
from pyreid.data.meshes import (
    ANGLES,
    MeshArrays,
    MeshedImage,
    MeshedImages,
    Meshes,
    MeshFile,
    MeshFolders,
    Photo,
    open_meshes,
    save_meshes,
)
from pyreid.data.samplers import camera_spread, multiple_gallery, shuffled
from pyreid.data.tracklets import Clip, Frames, Tracklets, camstyle

__all__ = [
    "ANGLES",
    "LAYOUTS",
    "Batch",
    "Clip",
    "Frames",
    "ImageArrays",
    "ImageError",
    "ImageFiles",
    "Images",
    "MeshArrays",
    "MeshFile",
    "MeshFolders",
    "MeshedImage",
    "MeshedImages",
    "Meshes",
    "Photo",
    "ReidData",
    "Tracklets",
    "as_images",
    "batches",
    "camera_spread",
    "camstyle",
    "frame_numbers",
    "images_in_order",
    "multiple_gallery",
    "open_csv",
    "open_data",
    "open_folder",
    "open_meshes",
    "readable",
    "save_meshes",
    "shuffled",
]
