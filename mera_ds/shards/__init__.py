"""Shards: media and their texts in ordinary tars, with an index for random access."""
