"""Pipelines of diffusers: the only place that knows its hooks, ``torch.compile`` and context parallelism."""
