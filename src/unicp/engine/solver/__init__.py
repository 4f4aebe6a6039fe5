"""The pipeline's solver: the weights it gives to outputs, and the longer steps it can take."""
