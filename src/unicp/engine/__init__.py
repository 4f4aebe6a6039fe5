"""Doing: the only place that knows torch modules and ``diffusers.hooks``."""
