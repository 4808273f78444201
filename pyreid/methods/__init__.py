"""The methods: each file is a paper."""

from pyreid.methods.cluster_contrast import ClusterContrast
from pyreid.methods.ice import ICE

METHODS = {"ice": ICE, "cluster-contrast": ClusterContrast}

__all__ = ["ICE", "METHODS", "ClusterContrast"]
