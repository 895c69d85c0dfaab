"""Frozen encoders, trainable connectors and the language model they feed."""
