"""``unicp models``: what can be accelerated, and how."""

from __future__ import annotations

import typer

from .screen import results


def models(debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error.")) -> None:
    """Lists the model families and the methods that are built in.

    A model that is not listed can be described in a few lines: unicp.register_spec. Methods that need no look into
    a model's blocks work on any diffusion transformer.
    """
    from rich.table import Table

    from ..policies import config_types
    from ..specs import known_specs

    specs = known_specs()
    families = Table("family", "denoiser", "blocks", title="models")
    for class_name, spec in sorted(specs.items(), key=lambda item: (item[1].family, item[0])):
        families.add_row(spec.family, class_name, ", ".join(described.path for described in spec.block_lists))
    methods = Table("method", "config", "", title="methods")
    for name, kind in sorted(config_types().items()):
        methods.add_row(name, kind.__name__, (kind.__doc__ or "").strip().partition("\n")[0])
    results().print(families, methods, sep="\n")
