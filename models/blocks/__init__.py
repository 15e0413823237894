"""Pieces that several papers share, one job per file. Maps are channels-last: ``[B, H, W, C]``."""
