"""Renders many prompts: reads them, has workers make clips, and records these in a manifest.

This package knows nothing of pipelines: a recipe makes the clips.

``prompts`` reads rows of a file. ``clips`` says what a clip is and who makes it. ``manifest`` and ``lock`` keep the
state on disk. ``worker`` is the work of one process, ``ranks`` are the processes of a worker; ``local`` and
``ray_engine`` run workers, and ``driver`` is the loop over all of them. ``progress`` and ``summary`` show it to a
person.
"""
