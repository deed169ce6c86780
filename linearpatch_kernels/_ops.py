"""The namespace of the operators in ``torch.ops``, alone, because a build for the package ``kernels`` has another.

``tools/kernels_layout.py`` writes this file anew there: two builds, and this package, then share a process.
"""

NAMESPACE = "linearpatch"
