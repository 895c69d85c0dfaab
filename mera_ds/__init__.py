"""mera-ds: add a modality to a multimodal LLM without breaking those it already has."""

__version__ = "0.1.0"
