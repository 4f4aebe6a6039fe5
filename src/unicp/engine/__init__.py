"""The engine carries out, on one denoiser, what a policy decides."""
