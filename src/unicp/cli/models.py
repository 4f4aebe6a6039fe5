"""``unicp models`` lists what can be accelerated, and how."""

from __future__ import annotations

import typer

from .screen import results


def models(debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error.")) -> None:
    """Lists the video models and the methods that are built in.

    What works: "stack" passes over all blocks at once (AdaCache, schedules), "units" keeps attention modules and MLPs
    (UniCP), "PCAS" slices attention (UniCP with a profile). Whatever keeps a model's whole output works on any of them,
    listed or not. A model that is not listed may be found by its structure, and can be described in a few lines:
    unicp.register_spec.
    """
    from rich.table import Table

    from ..policies.config import config_types
    from ..specs import known_specs, tested
    from ..specs.unsupported import UNSUPPORTED

    runs = tested()
    families = Table(title="models")
    families.add_column("family and denoiser", no_wrap=True)
    families.add_column("works")
    families.add_column("tested")
    for class_name, spec in sorted(known_specs().items(), key=lambda item: (item[1].family, item[0])):
        run = runs.get(class_name)
        works = ["stack"] if any(described.stacked for described in spec.block_lists) else []
        works += ["units"] if any(described.units for described in spec.block_lists) else []
        works += ["PCAS"] if run and run["sliced"] else []
        how = f"{len(run['cases'])} cases, {' and '.join(run['pipelines'])}" if run else "not tested"
        families.add_row(f"{spec.family}\n  {class_name}", ", ".join(works), how)
    others = Table("denoiser", "why not", title="not covered")
    for class_name, why in sorted(UNSUPPORTED.items()):
        others.add_row(class_name, why)
    methods = Table("method", "config", "", title="methods")
    for name, kind in sorted(config_types().items()):
        methods.add_row(name, kind.__name__, (kind.__doc__ or "").strip().partition("\n")[0])
    results().print(families, others, methods, sep="\n")
