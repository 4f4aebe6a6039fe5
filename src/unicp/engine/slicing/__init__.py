"""Attention modules that run on less than the whole: sliced along their channels, or on old maps."""
