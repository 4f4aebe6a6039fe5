"""Plans of a run: which denoising steps to compute, and what fills the others."""
