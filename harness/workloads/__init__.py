"""What a trial does with its model, one workload a file."""

from harness.workloads.workload import Workload

__all__ = ["Workload"]
