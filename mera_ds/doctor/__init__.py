"""What a run needs and whether it is there: files, official weights, shard sets, environment.

Imports no torch: of weight files only the headers are read, so that it takes a second.
"""

from mera_ds.doctor.environment import Fact, environment
from mera_ds.doctor.examine import examine, missing_paths
from mera_ds.doctor.findings import Finding

__all__ = ["Fact", "Finding", "environment", "examine", "missing_paths"]
