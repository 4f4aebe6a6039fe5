"""The pipeline's solver: what it makes of the outputs it is given, and longer steps of it."""
