"""Results on one self-contained page."""
