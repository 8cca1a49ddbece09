"""The model, read top to bottom like the paper's equations."""
