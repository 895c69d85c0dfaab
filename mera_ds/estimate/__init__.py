"""What a run will take, before it runs: memory, hours, disk, judge calls. Imports no torch."""
