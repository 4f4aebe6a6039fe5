"""Renders many prompts: reads them, has workers make clips, and records these in a manifest.

This package knows nothing of pipelines: a recipe makes the clips.

``prompts`` rows of a file, ``clips`` what a clip is and who makes it, ``manifest`` and ``lock`` the state on disk,
``worker`` one process's work, ``ranks`` the processes of a worker, ``local`` and ``ray_engine`` where workers run,
``driver`` the loop over all of them, ``progress`` and ``summary`` what a person sees.
"""
