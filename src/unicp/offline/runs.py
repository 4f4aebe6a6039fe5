"""What every measurement by runs of a pipeline does around them: prompts are checked, its own bar is hidden."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from ..errors import UnicpError
from ..tensors.private import PROGRESS_BAR


def check_prompts(prompts: Sequence[str] | None, call: Mapping[str, Any]) -> None:
    """Raises :class:`UnicpError` unless there are prompts, or the arguments of the call carry their embeddings."""
    if prompts is not None and (isinstance(prompts, str) or not prompts):
        raise UnicpError(f"prompts must be a list of prompts, got {prompts!r:.80}")
    # Kandinsky has one for each of its encoders: prompt_embeds_qwen, prompt_embeds_clip.
    if prompts is None and not any(name.startswith("prompt_embeds") and call[name] is not None for name in call):
        raise UnicpError("give prompts, or prompts=None and prompt_embeds=...")


@contextmanager
def own_bar_hidden(pipe: Any) -> Iterator[None]:
    """Without the pipeline's own progress bar. A pipeline that never had settings for it has none after that."""
    before = vars(pipe).get(PROGRESS_BAR)
    pipe.set_progress_bar_config(**{**(before or {}), "disable": True})
    try:
        yield
    finally:
        if before is None:  # with None in it no call of the pipeline works
            delattr(pipe, PROGRESS_BAR)
        else:
            setattr(pipe, PROGRESS_BAR, before)
