"""The server of ``unicp studio``, for this machine alone unless asked otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import UnicpError, missing_extra

HERE = Path(__file__).parent
HEAD = (
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
    # The browser itself enforces that nothing is fetched from, or sent to, anywhere else.
    "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'self' data: blob: 'unsafe-inline' "
    "'unsafe-eval'\">"
)
HOST = "127.0.0.1"
"""This machine alone."""


def check() -> None:
    """Refuse early where the extra is missing.

    Raises:
        UnicpError: Gradio is not installed; names the extra.
    """
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise missing_extra("Gradio", "studio", "the pages of unicp studio") from error


def launch(
    blocks: Any, *, host: str = HOST, port: int | None = None, share: bool = False, inbrowser: bool = False
) -> Any:
    """Serve the page; returns once it can be opened.

    Nothing is sent anywhere: Gradio's analytics, its record of runs and its links to outside are off, the fonts are the
    system's, and the page's own security policy forbids other hosts.

    Args:
        blocks: the page, by :func:`unicp.studio.page.build`.
        host: address to serve; ``"0.0.0.0"`` lets other machines in.
        port: port to serve; by default 7860, or the next free one.
        share: whether to ask Gradio's servers for a public link.

    Returns:
        The page; ``.local_url`` is the address, ``.close()`` ends it.

    Raises:
        UnicpError: no free port there.
    """
    import gradio as gr

    sans = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "DejaVu Sans", "sans-serif"]
    mono = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace"]
    theme = gr.themes.Default(primary_hue="orange", neutral_hue="stone", font=sans, font_mono=mono)
    try:
        blocks.queue(default_concurrency_limit=None).launch(
            server_name=host,
            server_port=port,
            share=share,
            inbrowser=inbrowser,
            quiet=True,
            prevent_thread_lock=True,
            show_error=False,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            enable_monitoring=False,
            run_history=False,
            footer_links=[],
            theme=theme,
            css=(HERE / "studio.css").read_text("utf-8"),
            head=HEAD,
        )
    except OSError as error:
        raise UnicpError(
            f"the page cannot be served at {host}:{port or 7860}; name another --host or --port"
        ) from error
    return blocks
