"""A profile is one ``.safetensors`` file with tensors and one JSON string of metadata."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UnicpError, unknown
from ..files.whole import digest, staged
from ..policies.budget import BudgetConfig, PlanBook
from ..policies.config import Config, config_from_dict, config_types
from ..policies.unicp import UniCPConfig
from .measured import DenoiserProfile as DenoiserProfile

FORMAT = 1
KEY = "unicp"


@dataclass(frozen=True, kw_only=True, eq=False)
class Profile:
    """A config, and the measurements that it rests on.

    Attributes:
        config: the config that ``accelerate`` uses when it is given the profile.
        tensors: measurements by name.
        metadata: further plain values (model, scheduler, steps, ...).
        path: path of the file from which it was read or to which it was last saved, if any.
    """

    config: Config
    tensors: Mapping[str, Any] = field(default_factory=dict, repr=False)
    metadata: Mapping[str, Any] = field(default_factory=dict, repr=False)
    path: str | None = None

    def __str__(self) -> str:
        return self.path or "that was not saved"

    def of(self, denoiser: str) -> DenoiserProfile:
        """The calibration of one denoiser, by its name in the pipeline.

        Raises:
            UnicpError: the profile was made without that denoiser, or holds no calibration, or it is damaged.
        """
        known = self.metadata.get("denoisers")
        if not isinstance(known, dict) or not isinstance(known.get(denoiser), dict):
            raise UnicpError(f"the profile holds no calibration of {denoiser!r}; make one with: unicp calibrate")
        prefix = f"{denoiser}/"
        tensors = {name[len(prefix) :]: t for name, t in self.tensors.items() if name.startswith(prefix)}
        about = known[denoiser]
        try:
            steps = self.metadata.get("steps") or len(about.get("sigmas") or ())
            part = DenoiserProfile(name=denoiser, steps=steps, tensors=tensors, metadata=about)
            wrong = part.damage()
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise UnicpError(f"the profile's calibration of {denoiser!r} is damaged: {error!r:.120}") from error
        if wrong:
            raise UnicpError(f"the profile's calibration of {denoiser!r} is damaged: {wrong}; make it again")
        return part

    def opened(self, denoiser: Any, name: str, pipe: Any) -> DenoiserProfile:
        """The calibration of a denoiser, checked to be of this very model and of the pipeline's scheduler.

        Args:
            denoiser: the module.
            name: its name in the pipeline.
            pipe: the pipeline, or ``None``: then the scheduler is not checked.

        Raises:
            UnicpError: it is of another model or scheduler, or there is none.
        """
        part = self.of(name)
        part.check_model(denoiser)
        self.check_scheduler(pipe)
        return part

    def check_scheduler(self, pipe: Any) -> None:
        """Check that a pipeline's scheduler is of the class that the profile was made with.

        Args:
            pipe: the pipeline, or ``None``: then nothing is checked.

        Raises:
            UnicpError: it is not.
        """
        scheduler = type(getattr(pipe, "scheduler", None)).__name__
        made = self.metadata.get("scheduler")
        if pipe is not None and made != scheduler:
            # Other sigmas of the same scheduler are translated; another one may mean other things by them.
            made = made if isinstance(made, str) and made.isidentifier() else repr(made)
            raise UnicpError(
                f"the profile {self} was made with a {made:.80}, this pipeline has a {scheduler}; "
                "make it again with that one"
            )

    def book(self, config: BudgetConfig) -> PlanBook:
        """The plans of the profile.

        Raises:
            UnicpError: there are none, or none reaches the target of ``config``.
        """
        if not isinstance(self.metadata.get("budget"), dict):
            raise UnicpError(f"the profile {self} holds no plans; make one with: unicp tune")
        book = PlanBook.from_dict(self.metadata["budget"])
        book.choose(config)
        return book

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one file, whole or not at all.

        Raises:
            UnicpError: it cannot be written.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        path = Path(path)
        try:
            with staged(path, "the profile ", parents=False) as part:
                tensors, about = self._written()
                save_file(tensors, part, metadata=about)
        except (OSError, SafetensorError) as error:
            raise UnicpError(f"cannot write the profile {path}: {getattr(error, 'strerror', None) or error}") from error
        object.__setattr__(self, "path", os.fspath(path))

    def _written(self) -> tuple[dict[str, Any], dict[str, str]]:
        """Tensors and metadata for a file. Tensors are copied, as the format takes no shared or transposed ones."""
        text = json.dumps({"format": FORMAT, "config": self.config.to_dict(), "metadata": dict(self.metadata)})
        return {k: t.detach().contiguous().clone() for k, t in self.tensors.items()}, {KEY: text}

    def digest(self) -> str:
        """SHA-256 of the file that :meth:`save` would write."""
        from safetensors.torch import save

        return hashlib.sha256(save(*self._written())).hexdigest()

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Profile:
        """Read a profile.

        Raises:
            UnicpError: the file is missing, is no profile, is damaged, or was written by a newer version.
        """
        from safetensors import SafetensorError, safe_open

        path = Path(path)
        if not os.path.isfile(path):  # unlike the method of Path, it takes any name
            raise _missing(path)
        try:
            with safe_open(path, framework="pt") as opened:
                text = (opened.metadata() or {}).get(KEY)
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
            raise UnicpError(f"{path} is not a readable profile: {str(error).splitlines()[0]:.120}") from error
        if text is None:
            raise UnicpError(
                f"{path} is a safetensors file, but no unicp profile; make one with: unicp calibrate, or unicp tune"
            )
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
            return cls(config=config_from_dict(config), tensors=tensors, metadata=metadata, path=os.fspath(path))
        except (UnicpError, TypeError, OverflowError, RecursionError) as error:
            raise UnicpError(f"the config in the profile {path} does not hold: {error!s:.400}") from error


def _missing(path: str | os.PathLike[str]) -> UnicpError:
    return UnicpError(f"there is no profile {path}; make one with: unicp calibrate, or unicp tune")


def config_of(profile: Profile | str | os.PathLike[str]) -> Config:
    """The config of a profile, ready for use: if it needs a profile, that is this one.

    Raises:
        UnicpError: the config has a stack with another profile.
    """
    loaded = profile if isinstance(profile, Profile) else Profile.load(profile)
    config = loaded.config
    if getattr(getattr(config, "stack", None), "profile", None) is not None:
        raise UnicpError(
            f"the config in the profile {loaded} names another profile in its stack; give both by yourself: "
            "UniCPConfig(profile=..., stack=BudgetConfig(profile=..., ...))"
        )
    if isinstance(config, (UniCPConfig, BudgetConfig)):  # never another file, whatever the config in this one names
        return config.replace(profile=profile if isinstance(profile, Profile) else os.fspath(profile))
    return config


def read(config: Config) -> Config:
    """The config with profiles in place of their paths. This is the one place where they are read.

    Raises:
        UnicpError: a profile is missing or damaged.
    """
    stack = getattr(config, "stack", None)
    if stack is not None:
        config = config.replace(stack=read(stack))
    path = getattr(config, "profile", None)
    return config if path is None or isinstance(path, Profile) else config.replace(profile=Profile.load(path))


def resolve_config(config: Any) -> Config:
    """A config from a config, the name of a method, a profile or the path of one.

    Raises:
        UnicpError: it is none of these.
    """
    if isinstance(config, Config):
        return config
    if isinstance(config, Profile):
        return config_of(config)
    kinds = config_types()
    if isinstance(config, str) and config in kinds:
        return kinds[config]()
    if isinstance(config, str | os.PathLike):
        path = Path(config)
        if path.suffix == ".safetensors" or os.path.exists(path):
            return config_of(path)
        raise unknown("method", str(config), [*kinds, "PROFILE.safetensors"])
    raise UnicpError(
        f"config must be a config object, the name of a method ({', '.join(kinds)}), a Profile or the path of one, "
        f"got {type(config).__name__}"
    )


def content_of(config: Config) -> dict[str, Any]:
    """The values of a config, with digests of its profiles instead of their paths.

    They tell results of different configs apart: a profile is identified by its content, not by its path.

    Raises:
        UnicpError: there is no such profile.
    """

    profile, stack = getattr(config, "profile", None), getattr(config, "stack", None)
    named = [name for name in ("profile", "stack") if getattr(config, name, None) is not None]
    found = config.replace(**dict.fromkeys(named)).to_dict()
    if stack is not None:
        found["stack"] = content_of(stack)
    if isinstance(profile, Profile):
        found["profile"] = profile.digest()
    elif profile is not None:
        if not Path(profile).is_file():
            raise _missing(profile)
        found["profile"] = digest(Path(profile))
    return found
