"""Text, tokenizers and Grain pipelines."""
