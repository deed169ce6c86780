"""The place that `linearpatch_kernels.processes` had in 0.1.0."""

from linearpatch_kernels.processes import Processes, check_alone, launched_processes, need_accelerate

__all__ = ["Processes", "check_alone", "launched_processes", "need_accelerate"]
