"""Attention modules that do only part of their work: sliced along their channels, or on old maps."""
