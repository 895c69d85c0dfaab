"""From shards to batches: units, prompts, mixtures and the loader."""
