"""The methods: each file is a paper."""

from typing import Any

from pyreid.methods.cluster_contrast import ClusterContrast
from pyreid.methods.ice import ICE
from pyreid.methods.jvtc import JVTC
from pyreid.methods.scl import SCL

METHODS: dict[str, Any] = {
    "ice": ICE,
    "cluster-contrast": ClusterContrast,
    "scl": SCL,
    "jvtc": JVTC,
}

__all__ = ["ICE", "JVTC", "METHODS", "SCL", "ClusterContrast"]
