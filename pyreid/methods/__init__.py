"""The methods: each file is a paper."""

from typing import Any

from pyreid.methods.cluster_contrast import ClusterContrast
from pyreid.methods.gcl import GCL
from pyreid.methods.ice import ICE
from pyreid.methods.scl import SCL

METHODS: dict[str, Any] = {"ice": ICE, "cluster-contrast": ClusterContrast, "scl": SCL, "gcl": GCL}

__all__ = ["GCL", "ICE", "METHODS", "SCL", "ClusterContrast"]
