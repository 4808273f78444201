"""Images in, batches out: image sets, the folders they come in, transforms, samplers, batches."""

try:
    import PIL  # noqa: F401
except ImportError:
    raise ImportError("pyreid.data takes Pillow: pip install 'pyreid[train]'") from None

from pyreid.data.batches import Batch
from pyreid.data.images import (
    ImageArrays,
    ImageError,
    ImageFiles,
    Images,
    ReidData,
    as_images,
    readable,
)
from pyreid.data.layouts import open_csv, open_data, open_folder

__all__ = [
    "Batch",
    "ImageArrays",
    "ImageError",
    "ImageFiles",
    "Images",
    "ReidData",
    "as_images",
    "open_csv",
    "open_data",
    "open_folder",
    "readable",
]
