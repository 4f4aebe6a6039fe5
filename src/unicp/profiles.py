"""Profiles: one ``.safetensors`` file with tensors and one JSON string of metadata."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import UnicpError
from .policies import Config, config_from_dict

FORMAT = 1
KEY = "unicp"


@dataclass(frozen=True, kw_only=True)
class Profile:
    """A config, and what was measured to make it.

    Attributes:
        config: the config that ``accelerate`` uses when it is given the profile.
        tensors: measurements by name.
        metadata: further plain values (model, scheduler, steps, ...).
    """

    config: Config
    tensors: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Write one file, whole or not at all."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        path = Path(path)
        text = json.dumps({"format": FORMAT, "config": self.config.to_dict(), "metadata": dict(self.metadata)})
        part = path.with_name(path.name + ".part")
        try:
            # Copies: the format takes neither tensors that share memory nor transposed ones.
            save_file({k: t.detach().contiguous().clone() for k, t in self.tensors.items()}, part, metadata={KEY: text})
            part.replace(path)
        except (OSError, SafetensorError) as error:
            raise UnicpError(f"cannot write the profile {path}: {getattr(error, 'strerror', None) or error}") from error
        finally:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        """Read a profile.

        Raises:
            UnicpError: the file is missing, is no profile, is damaged, or was written by a newer version.
        """
        from safetensors import SafetensorError, safe_open

        path = Path(path)
        if not os.path.isfile(path):  # unlike the method of Path, it takes any name
            raise UnicpError(f"there is no profile {path}; make one with: unicp calibrate")
        try:
            with safe_open(path, framework="pt") as opened:
                text = (opened.metadata() or {}).get(KEY)
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
            raise UnicpError(f"{path} is not a readable profile: {str(error).splitlines()[0]:.120}") from error
        if text is None:
            raise UnicpError(f"{path} is a safetensors file, but no unicp profile; make one with: unicp calibrate")
        try:
            values = json.loads(text)
            version = values["format"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UnicpError(f"the metadata of the profile {path} is damaged: {error!r:.120}") from error
        if type(version) is not int or version != FORMAT:
            raise UnicpError(
                f"the profile {path} has format {version!r:.20}, this unicp reads format {FORMAT}; update unicp or "
                "make the profile again"
            )
        config, metadata = values.get("config"), values.get("metadata")
        if not isinstance(config, dict) or not isinstance(metadata, dict):
            raise UnicpError(f"the metadata of the profile {path} is damaged: config and metadata must be mappings")
        try:
            return cls(config=config_from_dict(config), tensors=tensors, metadata=metadata)
        except (UnicpError, TypeError, OverflowError) as error:
            raise UnicpError(f"the config in the profile {path} does not hold: {error}") from error
