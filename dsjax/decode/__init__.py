"""Generation: prefill, compiled decode loop, sampling."""
