"""Plans of a run say which denoising steps to compute, and what fills the others."""
