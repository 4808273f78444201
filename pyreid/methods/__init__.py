"""The methods: each file is a paper."""

from typing import Any

from pyreid.methods.cluster_contrast import ClusterContrast
from pyreid.methods.gcl import GCL
from pyreid.methods.ice import ICE
from pyreid.methods.jvtc import JVTC
from pyreid.methods.scl import SCL

METHODS: dict[str, Any] = {
    "ice": ICE,
    "cluster-contrast": ClusterContrast,
    "scl": SCL,
    "jvtc": JVTC,
    "gcl": GCL,
}

__all__ = ["GCL", "ICE", "JVTC", "METHODS", "SCL", "ClusterContrast"]
