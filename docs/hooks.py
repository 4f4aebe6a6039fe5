"""What the build of the site adds: the options of the command line, and how docstrings and files are referred to."""

from __future__ import annotations

import re
from typing import Any

MARK = "<!-- the commands -->"


def commands() -> str:
    """Every verb with its help and a table of its options, in Markdown."""
    import typer

    from unicp.cli import VERBS, app

    group: Any = typer.main.get_command(app)
    parts = []
    for verb in VERBS:
        command = group.commands[verb]
        text = (command.help or "").replace("[bold]Examples[/bold]\n\n", "")
        parts += [f"## unicp {verb}", "", *_help(text), "", "| option | what it is |", "|---|---|"]
        for parameter in command.params:
            if getattr(parameter, "hidden", False):
                continue
            flag = parameter.param_type_name == "option"
            names = ", ".join([*parameter.opts, *parameter.secondary_opts]) if flag else ""
            metavar = "" if getattr(parameter, "is_flag", False) else f" {parameter.metavar or ''}".rstrip()
            about = (getattr(parameter, "help", None) or "").replace("|", "\\|")
            default = parameter.default
            plain = isinstance(default, str | int | float) and not isinstance(default, bool)
            parts.append(f"| `{(names + metavar).strip()}` | {about}{f' Default: `{default}`.' if plain else ''} |")
        parts.append("")
    return "\n".join(parts)


def _help(text: str) -> list[str]:
    """Examples as code; the rest as it is."""
    lines = []
    for paragraph in text.strip().split("\n\n"):
        paragraph = " ".join(line.strip() for line in paragraph.splitlines())
        lines += ["```sh", paragraph, "```", ""] if paragraph.startswith("unicp ") else [paragraph, ""]
    return lines


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """MkDocs calls this for each page: files of the repository that are no pages are named, not linked."""
    out = rf"(?:\.\./){{{page.file.src_uri.count('/') + 1}}}"  # of the folder with the pages
    markdown = re.sub(rf"\[([^]]+)\]\({out}[^)]*\)", r"\1", markdown)
    return markdown.replace(MARK, commands()) if MARK in markdown else markdown


def on_page_content(html: str, **_: Any) -> str:
    """The roles of docstrings, as in ``:func:`~unicp.tune```, become the last name alone."""
    return re.sub(r":(?:func|class|meth|attr|mod|data|exc):<code>~?(?:[\w.]*\.)?(\w+)</code>", r"<code>\1</code>", html)
