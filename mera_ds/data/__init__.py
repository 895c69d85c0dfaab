"""From shards to batches: decoding, prompts, mixtures and the loader."""
