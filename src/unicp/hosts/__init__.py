"""Hosts call the denoiser; each has a package of its own."""
