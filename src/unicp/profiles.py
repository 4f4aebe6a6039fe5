"""Profiles: one ``.safetensors`` file with tensors and one JSON string of metadata."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import UnicpError, unknown
from .policies.budget import BudgetConfig, PlanBook
from .policies.config import Config, config_from_dict, config_types
from .policies.unicp import UniCPConfig
from .policies.unit_errors import UnitErrors

FORMAT = 1
KEY = "unicp"
UNIT_TENSORS = ("cache_mean", "cache_max", "moment_qk", "moment_v", "slicing")


@dataclass(frozen=True, kw_only=True, eq=False)
class Profile:
    """A config, and what was measured to make it.

    Attributes:
        config: the config that ``accelerate`` uses when it is given the profile.
        tensors: measurements by name.
        metadata: further plain values (model, scheduler, steps, ...).
        path: of the file that it was read from or saved to last, if any.
    """

    config: Config
    tensors: Mapping[str, Any] = field(default_factory=dict, repr=False)
    metadata: Mapping[str, Any] = field(default_factory=dict, repr=False)
    path: str | None = None

    def __str__(self) -> str:
        return self.path or "that was not saved"

    def of(self, denoiser: str) -> DenoiserProfile:
        """What it holds of one denoiser, by the name its pipeline gives it.

        Raises:
            UnicpError: it was made without that denoiser, or holds no calibration.
        """
        known = self.metadata.get("denoisers")
        if not isinstance(known, dict) or not isinstance(known.get(denoiser), dict):
            raise UnicpError(f"the profile holds no calibration of {denoiser!r}; make one with: unicp calibrate")
        prefix = f"{denoiser}/"
        tensors = {name[len(prefix) :]: t for name, t in self.tensors.items() if name.startswith(prefix)}
        about = known[denoiser]
        try:
            steps = about.get("steps") or self.metadata.get("steps") or len(about.get("sigmas") or ())
            part = DenoiserProfile(name=denoiser, steps=steps, tensors=tensors, metadata=about)
            wrong = part.damage()
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise UnicpError(f"the profile's calibration of {denoiser!r} is damaged: {error!r:.120}") from error
        if wrong:
            raise UnicpError(f"the profile's calibration of {denoiser!r} is damaged: {wrong}; make it again")
        return part

    def opened(self, denoiser: Any, name: str, pipe: Any) -> DenoiserProfile:
        """What it holds of a denoiser, seen to be of this very model and of the pipeline's scheduler.

        Raises:
            UnicpError: it is not.
        """
        part = self.of(name)
        part.check_model(denoiser)
        scheduler = type(getattr(pipe, "scheduler", None)).__name__
        made = self.metadata.get("scheduler")
        if pipe is not None and made != scheduler:
            # Other sigmas of the same scheduler are translated; another one may mean other things by them.
            made = made if isinstance(made, str) and made.isidentifier() else repr(made)
            raise UnicpError(
                f"the profile {self} was made with a {made:.80}, this pipeline has a {scheduler}; "
                "make it again with that one"
            )
        return part

    def book(self, config: BudgetConfig) -> PlanBook:
        """Its plans.

        Raises:
            UnicpError: there are none, or none that reaches the target.
        """
        if not isinstance(self.metadata.get("budget"), dict):
            raise UnicpError(f"the profile {self} holds no plans; make one with: unicp tune")
        book = PlanBook.from_dict(self.metadata["budget"])
        book.choose(config)
        return book

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one file, whole or not at all."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        path = Path(path)
        part = path.with_name(path.name + ".part")
        try:
            tensors, about = self._written()
            save_file(tensors, part, metadata=about)
            part.replace(path)
            object.__setattr__(self, "path", os.fspath(path))
        except (OSError, SafetensorError) as error:
            raise UnicpError(f"cannot write the profile {path}: {getattr(error, 'strerror', None) or error}") from error
        finally:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)

    def _written(self) -> tuple[dict[str, Any], dict[str, str]]:
        """What goes into a file. Copies: the format takes neither tensors that share memory nor transposed ones."""
        text = json.dumps({"format": FORMAT, "config": self.config.to_dict(), "metadata": dict(self.metadata)})
        return {k: t.detach().contiguous().clone() for k, t in self.tensors.items()}, {KEY: text}

    def digest(self) -> str:
        """SHA-256 of the file that it would be saved as."""
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
            return cls(config=config_from_dict(config), tensors=tensors, metadata=metadata, path=os.fspath(path))
        except (UnicpError, TypeError, OverflowError, RecursionError) as error:
            raise UnicpError(f"the config in the profile {path} does not hold: {error!s:.400}") from error


def _missing(path: str | os.PathLike[str]) -> UnicpError:
    return UnicpError(f"there is no profile {path}; make one with: unicp calibrate, or unicp tune")


def config_of(profile: Profile | str | os.PathLike[str]) -> Config:
    """The config of a profile, ready for use: one that needs what was measured finds it in the same one."""
    loaded = profile if isinstance(profile, Profile) else Profile.load(profile)
    config = loaded.config
    if getattr(getattr(config, "stack", None), "profile", None) is not None:
        raise UnicpError(
            f"the config in the profile {loaded} names another profile in its stack; give both by yourself: "
            "UniCPConfig(profile=..., stack=BudgetConfig(profile=..., ...))"
        )
    if isinstance(config, (UniCPConfig, BudgetConfig)):  # never another file, whatever this one says
        return config.replace(profile=profile if isinstance(profile, Profile) else os.fspath(profile))
    return config


def read(config: Config) -> Config:
    """The config with profiles in place of their paths: each is read once, here.

    Raises:
        UnicpError: one is missing or damaged.
    """
    stack = getattr(config, "stack", None)
    if stack is not None:
        config = config.replace(stack=read(stack))
    path = getattr(config, "profile", None)
    return config if path is None or isinstance(path, Profile) else config.replace(profile=Profile.load(path))


def resolve_config(config: Any) -> Config:
    """A config from a config, the name of a method, a profile or the path of one."""
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


def played(config: Config) -> Config:
    """What carries a config out: of a budget whose plan has UniCP inside some steps, that UniCP over the budget.

    Args:
        config: with its profiles read (:func:`read`).

    Raises:
        UnicpError: its profile is damaged, or has no plan that reaches the target.
    """
    if not isinstance(config, BudgetConfig) or config.profile is None:
        return config
    about = config.profile.metadata
    if not isinstance(about.get("inside"), dict) or not isinstance(about.get("budget"), dict):
        return config
    if not PlanBook.from_dict(about["budget"]).choose(config).plan.inside:
        return config
    inside = config_from_dict(about["inside"])
    if not isinstance(inside, UniCPConfig):
        raise UnicpError(f"the profile {config.profile} is damaged: what acts inside is {inside.method!r}; tune again")
    calibrated = any(part.get("units") for part in about["denoisers"].values())
    return inside.replace(profile=config.profile if calibrated else None, stack=config)


def content_of(config: Config) -> dict[str, Any]:
    """The values of a config, with digests of the profiles that it names instead of their paths.

    It tells results of different configs apart: a profile counts by what is in it, wherever it lies.

    Raises:
        UnicpError: there is no such profile.
    """

    from .files.video import digest  # it needs numpy, which the command line must not wait for

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


def identity(value: Any) -> Any:
    """What tells one argument of a pipeline from another, in every process: pictures and tensors by their bytes."""
    if isinstance(value, list | tuple):
        return [identity(each) for each in value]
    if hasattr(value, "detach"):
        value = value.detach().cpu().float().numpy()
    if hasattr(value, "tobytes"):
        return [type(value).__name__, hashlib.sha256(value.tobytes()).hexdigest()[:16]]
    return getattr(value, "__qualname__", None) or repr(value)


def _plain(text: Any) -> str:
    """What a profile says, fit for one line."""
    return str(text)[:40] if str(text).isprintable() else repr(text)[:40]


def _size(module: Any, name: str, parameter: Any) -> tuple[int, ...]:
    """The size that a parameter has where nothing is quantised: packed ones have the shape of their bytes."""
    of_bitsandbytes, of_gguf = (getattr(parameter, key, None) for key in ("quant_state", "quant_shape"))
    shape = of_gguf if of_gguf is not None else getattr(of_bitsandbytes, "shape", None)
    if shape is None and name == "weight":
        features = (getattr(module, "out_features", None), getattr(module, "in_features", None))
        shape = features if all(type(count) is int for count in features) else None
    return tuple(shape if shape is not None else parameter.shape)


def fingerprint(denoiser: Any) -> str:
    """What tells one model from another, without reading its weights: class, sizes of all parameters, config.

    Names that adapters and hooks add do not count, nor does the precision, quantised or not.
    """
    sizes = []
    for name, parameter in denoiser.named_parameters():
        if "lora_" not in name:
            path, _, own = name.rpartition(".")
            sizes.append((name.replace(".base_layer", ""), _size(denoiser.get_submodule(path), own, parameter)))
    config = {
        k: v
        for k, v in dict(getattr(denoiser, "config", {})).items()
        if not k.startswith("_") and k != "quantization_config"
    }
    text = json.dumps([type(denoiser).__name__, sorted(sizes), config], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def weights_digest(modules: Mapping[str, Any]) -> str:
    """A digest of the weights of several modules: names, shapes, precision, and sums of those that are loaded."""
    import torch

    digest = hashlib.sha256()
    for name, module in sorted(modules.items()):
        for key, tensor in sorted(module.state_dict().items()):
            digest.update(f"{name}.{key} {tuple(tensor.shape)} {tensor.dtype}".encode())
            if not tensor.is_meta:  # as those are that accelerate keeps elsewhere
                flat = tensor.detach().flatten().to(torch.float32)
                sums = (float(flat.sum(dtype=torch.float64)), float(flat.abs().sum(dtype=torch.float64)))
                digest.update(f" {sums[0]:.9g} {sums[1]:.9g}".encode())
    return digest.hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class DenoiserProfile:
    """The part of a profile that belongs to one denoiser.

    Attributes:
        name: what its pipeline calls it.
        steps: number of denoising steps of the calibration's runs.
        tensors: measurements: of a unit ``u``, ``u/cache_mean`` and ``u/cache_max`` (N, K): change of its output from
            step t to t + k; ``u/moment_qk`` and ``u/moment_v`` (H, d, d); ``u/slicing`` (R, 3): change of its output at
            each rank when queries, keys and values, only queries and keys, or only values are sliced. Further
            ``stack/cache_mean`` and ``stack/cache_max`` (N, K) of the residual of all blocks, ``metric`` (N,) and
            ``motion`` (N,): AdaCache's change per step and MoReg's motion score.
        metadata: ``class``, ``fingerprint``, ``sigmas``, ``units`` (kind by name), ``ranks``.
    """

    name: str
    steps: int
    tensors: Mapping[str, Any]
    metadata: Mapping[str, Any]

    @property
    def sigmas(self) -> list[float]:
        return [float(s) for s in self.metadata["sigmas"]]

    @property
    def units(self) -> dict[str, str]:
        return dict(self.metadata.get("units", {}))

    def damage(self) -> str:
        """What is wrong with its names, numbers and shapes, or nothing (``""``)."""
        made, sigmas, units = self.metadata.get("class"), self.metadata.get("sigmas"), self.metadata.get("units", {})
        if not isinstance(made, str) or not isinstance(self.metadata.get("fingerprint"), str):
            return "it does not say of which model it is"
        numbers = isinstance(sigmas, list) and all(type(s) in (int, float) and math.isfinite(s) for s in sigmas)
        if not numbers or type(self.steps) is not int or not 0 <= self.steps <= 10_000:
            return "'sigmas' must be numbers, 'steps' one up to 10000"
        if not isinstance(units, dict) or not all(isinstance(kind, str) for kind in units.values()):
            return "'units' must name the kind of each unit"
        for unit in units:
            shapes = {name: self._shape(f"{unit}/{name}") for name in UNIT_TENSORS}
            mean, most, qk, v, slicing = shapes.values()
            if mean is None or len(mean) != 2 or mean != most:
                return f"the changes of {unit!r:.80} have the shapes {mean} and {most}"
            if qk is None and v is None:
                continue
            ranks = self.metadata["ranks"][unit]
            if qk is None or len(qk) != 3 or not qk[1] == qk[2] > 0 or qk != v or slicing != (len(ranks), 3):
                return f"the moments and slicing errors of {unit!r:.80} have the shapes {qk}, {v} and {slicing}"
            if not all(bool(self.tensors[f"{unit}/{name}"].isfinite().all()) for name in UNIT_TENSORS[2:4]):
                return f"the moments of {unit!r:.80} are not finite"
            if not all(type(rank) is int and 0 < rank <= qk[1] for rank in ranks):
                return f"the ranks of {unit!r:.80} must be whole numbers up to {qk[1]}"
        return ""

    def _shape(self, name: str) -> tuple[int, ...] | None:
        """Shape of a tensor of real numbers; ``None`` for any other, or none."""
        tensor = self.tensors.get(name)
        return tuple(tensor.shape) if tensor is not None and tensor.is_floating_point() else None

    def check_model(self, denoiser: Any) -> None:
        """Refuse a denoiser that the profile was not made on.

        Raises:
            UnicpError: its class or its sizes are others.
        """
        made, given = self.metadata["class"], type(denoiser).__name__
        if made != given:
            raise UnicpError(
                f"the profile was made on a {_plain(made)}, this is a {given}; calibrate again on this model"
            )
        theirs, ours = self.metadata["fingerprint"], fingerprint(denoiser)
        if theirs != ours:
            raise UnicpError(
                f"the profile was made on another {made} (fingerprint {_plain(theirs)}, this one has {ours}); "
                "calibrate again on this model"
            )

    def check_units(self, units: Mapping[str, str]) -> None:
        """Refuse if nothing was measured of one of these units.

        Raises:
            UnicpError: that is so.
        """
        missing = [unit for unit in units if unit not in self.units]
        if missing:
            raise UnicpError(f"the profile says nothing of {missing[0]!r} and {len(missing) - 1} more; calibrate again")

    def errors(self, statistic: str, sliced: Mapping[str, float]) -> UnitErrors:
        """The plain numbers a policy decides by: ``statistic`` is ``"mean"`` or ``"max"``."""
        cache = {unit: self.tensors[f"{unit}/cache_{statistic}"].tolist() for unit in self.units}
        return UnitErrors(sigmas=self.sigmas, steps=self.steps, cache=cache, sliced=dict(sliced))

    def moments(self, unit: str) -> tuple[Any, Any] | None:
        """Second moments (queries and keys, values) of a unit, or ``None`` where none were measured."""
        if f"{unit}/moment_qk" not in self.tensors:
            return None
        return self.tensors[f"{unit}/moment_qk"], self.tensors[f"{unit}/moment_v"]

    def slicing(self, unit: str) -> dict[int, tuple[float, float, float]]:
        """Slicing errors by rank: everything sliced, only queries and keys, only values."""
        rows = self.tensors[f"{unit}/slicing"].tolist()
        ranks = self.metadata["ranks"][unit]
        return {int(rank): (float(row[0]), float(row[1]), float(row[2])) for rank, row in zip(ranks, rows, strict=True)}
