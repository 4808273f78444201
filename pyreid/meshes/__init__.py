"""Pictures of bodies for anyone's photos: what GCL's generator is told the pose by, without HMR or SMPL.

A body of our own, of tapered capsules, stands in for a mesh (`figure`): in the pose that keypoints tell of
(`keypoints`), or walking. Who has an SMPL model and what a regressor found in their photos renders that
(`smpl`, `raster`); of made-up people the true body is known (`people_meshes`). All come grey on white, as in
the photo and turned by 45 to 315 degrees.
"""

from pyreid.meshes.figure import neutral, turns
from pyreid.meshes.keypoints import COCO, lift, read_keypoints
from pyreid.meshes.raster import rasterise
from pyreid.meshes.render import make_meshes, people_meshes, write_meshes
from pyreid.meshes.smpl import (
    Bodies,
    BodyModel,
    mesh_turns,
    read_bodies,
    read_model,
    read_obj,
)

__all__ = [
    "COCO",
    "Bodies",
    "BodyModel",
    "lift",
    "make_meshes",
    "mesh_turns",
    "neutral",
    "people_meshes",
    "rasterise",
    "read_bodies",
    "read_keypoints",
    "read_model",
    "read_obj",
    "turns",
    "write_meshes",
]
