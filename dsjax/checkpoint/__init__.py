"""Hugging Face and Orbax checkpoints, both directions."""
