"""Pure functions on tensors: no model, no state."""
