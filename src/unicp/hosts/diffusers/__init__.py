"""The host for diffusers' pipelines: the only place that knows its hooks, ``torch.compile`` and context parallelism."""
