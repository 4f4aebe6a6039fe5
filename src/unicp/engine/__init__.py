"""Doing: acts out on one denoiser what a policy decides."""
