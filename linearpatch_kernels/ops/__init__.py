"""The operators. Each is a folder: ``operator.py`` (contract, registration), ``reference.py`` (the maths), kernels."""
