"""Training: one loop for every phase and method, behind one engine (layer 3)."""
