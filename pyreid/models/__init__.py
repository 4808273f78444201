"""Encoders of images, GCL's generator, and what training them takes: ghost batch norm, a moving average,
checkpoints."""

from pyreid.models.build import build_encoder, build_part_encoder
from pyreid.models.checkpoints import Loaded, load_weights, save_weights
from pyreid.models.encoder import Encoder, PartEncoder, StripeEncoder
from pyreid.models.generator import Decoder, Discriminator, Generator, StructureEncoder
from pyreid.models.ghost_norm import GhostBatchNorm, ghost_, separate_statistics
from pyreid.models.teacher import Teacher

__all__ = [
    "Decoder",
    "Discriminator",
    "Encoder",
    "Generator",
    "GhostBatchNorm",
    "Loaded",
    "PartEncoder",
    "StripeEncoder",
    "StructureEncoder",
    "Teacher",
    "build_encoder",
    "build_part_encoder",
    "ghost_",
    "load_weights",
    "save_weights",
    "separate_statistics",
]
