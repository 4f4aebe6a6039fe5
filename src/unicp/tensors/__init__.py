"""Functions on tensors and counts of what tensors cost, without knowledge of any model."""
