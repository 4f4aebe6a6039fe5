"""Helpers for measurements that run a pipeline: they check prompts and hide the pipeline's own progress bar."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from ..errors import UnicpError
from ..tensors.private import PROGRESS_BAR


def check_prompts(prompts: Sequence[str] | None, call: Mapping[str, Any]) -> None:
    """Check that there are prompts, or that the arguments of the call carry their embeddings.

    Raises:
        UnicpError: there are neither, a prompt is not text, or the call carries a prompt of its own, too.
    """
    if prompts is not None and (isinstance(prompts, str) or not isinstance(prompts, Sequence) or not prompts):
        raise UnicpError(f"prompts must be a list of prompts, got {prompts!r:.80}")
    for prompt in prompts or ():
        if not isinstance(prompt, str):
            raise UnicpError(f"a prompt must be text, got {prompt!r:.80}")
    if prompts is not None and call.get("prompt") is not None:
        raise UnicpError("prompts are given already; leave prompt out")
    # Kandinsky has one for each of its encoders: prompt_embeds_qwen, prompt_embeds_clip.
    if prompts is None and not any(name.startswith("prompt_embeds") and call[name] is not None for name in call):
        raise UnicpError("give prompts, or prompts=None and prompt_embeds=...")


@contextmanager
def own_bar_hidden(pipe: Any) -> Iterator[None]:
    """Hide the pipeline's own progress bar within the block; afterwards its settings are as they were."""
    before = vars(pipe).get(PROGRESS_BAR)
    pipe.set_progress_bar_config(**{**(before or {}), "disable": True})
    try:
        yield
    finally:
        if before is None:  # a pipeline with None as this setting cannot be called
            delattr(pipe, PROGRESS_BAR)
        else:
            setattr(pipe, PROGRESS_BAR, before)
