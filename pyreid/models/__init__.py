"""Encoders of images, and what training them takes: ghost batch norm, a moving average, checkpoints."""

from pyreid.models.build import build_encoder
from pyreid.models.checkpoints import Loaded, load_weights, save_weights
from pyreid.models.encoder import Encoder, StripeEncoder
from pyreid.models.ghost_norm import GhostBatchNorm, ghost_
from pyreid.models.teacher import Teacher

__all__ = [
    "Encoder",
    "GhostBatchNorm",
    "Loaded",
    "StripeEncoder",
    "Teacher",
    "build_encoder",
    "ghost_",
    "load_weights",
    "save_weights",
]
