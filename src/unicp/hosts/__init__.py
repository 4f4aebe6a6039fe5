"""Hosts: what calls the denoiser. One package each."""
