"""The methods: each file is a paper."""

from typing import Any

from pyreid.methods.cluster_contrast import ClusterContrast
from pyreid.methods.ice import ICE

METHODS: dict[str, Any] = {"ice": ICE, "cluster-contrast": ClusterContrast}

__all__ = ["ICE", "METHODS", "ClusterContrast"]
