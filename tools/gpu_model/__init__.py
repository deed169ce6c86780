"""A model of the GPU kernels without a GPU: their machine code, compiled ahead of time, counted and run (`model`)."""
