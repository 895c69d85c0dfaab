"""Merging backbones (layer 2): by lineage, exactly, and as a literal average of state dicts."""
