"""The patch at a joint, ``y = (((x * pre) @ H) * scale) @ H.T * post + (x @ down) @ up``, alone and before a norm."""

from linearpatch_kernels.ops.hadamard_patch.operator import add_patch_rms_norm, hadamard_patch

__all__ = ["add_patch_rms_norm", "hadamard_patch"]
