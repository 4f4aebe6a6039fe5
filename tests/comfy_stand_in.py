"""What a custom node sees of ComfyUI, without ComfyUI: the wrapper protocol, a guider, samplers and a scheduler.

Written from what the program does, for tests and `benchmarks/comfyui.py`: who wraps what, what is copied when, in which
order samplers evaluate the model. Samplers are written from their papers in the k-diffusion form, ``dx/dsigma = (x -
denoised) / sigma``. :func:`install` makes it importable as ``comfy``.
"""

from __future__ import annotations

import copy
import math
import sys
import types
import uuid
from collections.abc import Callable
from typing import Any

import torch


class WrappersMP:
    OUTER_SAMPLE = "outer_sample"
    PREPARE_SAMPLING = "prepare_sampling"
    SAMPLER_SAMPLE = "sampler_sample"
    PREDICT_NOISE = "predict_noise"
    CALC_COND_BATCH = "calc_cond_batch"
    APPLY_MODEL = "apply_model"
    DIFFUSION_MODEL = "diffusion_model"


def install() -> None:
    """Make ``comfy`` and ``comfy.patcher_extension`` importable."""
    package, extension = types.ModuleType("comfy"), types.ModuleType("comfy.patcher_extension")
    package.__path__ = []
    package.patcher_extension = extension
    extension.WrappersMP = WrappersMP
    sys.modules["comfy"], sys.modules["comfy.patcher_extension"] = package, extension


class Executor:
    """What wrappers are given: calling it calls the next wrapper, or what is wrapped."""

    def __init__(self, original: Callable, class_obj: Any, wrappers: list[Callable], place: int = -1) -> None:
        self.original, self.class_obj, self._wrappers, self._place = original, class_obj, wrappers, place

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        place = self._place + 1
        if place == len(self._wrappers):
            return self.original(*args, **kwargs)
        return self._wrappers[place](Executor(self.original, self.class_obj, self._wrappers, place), *args, **kwargs)


def wrapped(kind: str, original: Callable, class_obj: Any, options: dict) -> Executor:
    keyed = options.get("transformer_options", {}).get("wrappers", {}).get(kind, {})
    return Executor(original, class_obj, [wrapper for each in keyed.values() for wrapper in each])


def copied(options: dict) -> dict:
    """Dictionaries and lists are new ones, what is in them is shared."""
    kinds = {dict: copied, list: list}
    return {name: kinds.get(type(value), lambda same: same)(value) for name, value in options.items()}


class ModelPatcher:
    """A model of the program, with what nodes have put on it."""

    def __init__(self, model: Any) -> None:
        self.model, self.load_device = model, torch.device("cpu")
        self.model_options: dict = {"transformer_options": {}}
        self.wrappers: dict[str, dict[str, list[Callable]]] = {}

    def clone(self) -> ModelPatcher:
        new = ModelPatcher(self.model)
        new.model_options, new.wrappers = copied(self.model_options), copied(self.wrappers)
        return new

    def add_wrapper_with_key(self, kind: str, key: str, wrapper: Callable) -> None:
        self.wrappers.setdefault(kind, {}).setdefault(key, []).append(wrapper)

    def remove_wrappers_with_key(self, kind: str, key: str) -> None:
        self.wrappers.get(kind, {}).pop(key, None)

    def get_wrappers(self, kind: str, key: str) -> list[Callable]:
        return self.wrappers.get(kind, {}).get(key, [])

    def get_model_object(self, name: str) -> Any:
        return getattr(self.model, name)


class Flow:
    """Noise levels of a flow-matching model: (1 - sigma) * x0 + sigma * noise."""

    def __init__(self, shift: float = 1.0) -> None:
        t = torch.arange(1, 1001) / 1000
        self.sigmas = shift * t / (1 + (shift - 1) * t)

    def noise_scaling(self, sigma: Any, noise: Any, latent: Any) -> Any:
        return sigma * noise + (1 - sigma) * latent

    def inverse_noise_scaling(self, sigma: Any, latent: Any) -> Any:
        return latent / (1 - sigma)


class Eps(Flow):
    """Noise levels of a model that predicts noise: x0 + sigma * noise."""

    def __init__(self) -> None:
        alphas = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)
        self.sigmas = ((1 - alphas) / alphas).sqrt()

    def noise_scaling(self, sigma: Any, noise: Any, latent: Any) -> Any:
        return latent + sigma * noise

    def inverse_noise_scaling(self, sigma: Any, latent: Any) -> Any:
        return latent


class Model:
    """A network behind the program's interface.

    Args:
        network: ``(x, sigma (B,), context) ->`` velocity, or noise: either is ``(x - x0) / sigma``.
        sampling: its noise levels.
        together: whether branches whose conditions have one shape run as one batch, as memory allows.

    Attributes:
        forwards: branches that were computed, since somebody set it to 0.
    """

    def __init__(self, network: Callable, sampling: Any, together: bool = True) -> None:
        self.network, self.model_sampling, self.together, self.forwards = network, sampling, together, 0

    def apply_model(self, x: Any, sigma: Any, c_crossattn: Any, transformer_options: dict) -> Any:
        self.forwards += len(transformer_options["cond_or_uncond"])
        options = {"transformer_options": transformer_options}
        call = wrapped(WrappersMP.DIFFUSION_MODEL, self._diffusion_model, self, options)
        velocity = call(x, sigma, c_crossattn, transformer_options=transformer_options)
        return x - velocity * sigma.reshape(-1, *(1,) * (x.ndim - 1))

    def _diffusion_model(self, x: Any, sigma: Any, context: Any, transformer_options: dict) -> Any:
        return self.network(x, sigma, context)


def _acts(cond: dict, sigma: float) -> bool:
    return cond.get("timestep_start", math.inf) >= sigma >= cond.get("timestep_end", 0.0)


def calc_cond_batch(model: Model, conds: list, x: Any, sigma: Any, options: dict) -> list:
    windows = options.get("context_windows")  # lengths of parts along frames, each computed for itself
    if windows and x.shape[2] > windows:
        inner = {name: value for name, value in options.items() if name != "context_windows"}
        parts = [calc_cond_batch(model, conds, part, sigma, inner) for part in x.split(windows, dim=2)]
        return [torch.cat(branch, dim=2) for branch in zip(*parts, strict=True)]
    at = float(sigma[0])
    conds = [None if branch is None else [c for c in branch if _acts(c, at)] for branch in conds]
    there = [i for i, branch in enumerate(conds) if branch]
    shapes = {tuple(c["cross_attn"].shape) for i in there for c in conds[i]}
    out = [torch.zeros_like(x) for _ in conds]
    groups = [there] if model.together and len(shapes) == 1 else [[i] for i in there]
    for group in groups:
        entries = [(i, cond) for i in group for cond in conds[i]]
        for batch in [entries] if len(groups) == 1 and len(group) > 1 else [[entry] for entry in entries]:
            context = torch.cat([cond["cross_attn"].expand(len(x), *cond["cross_attn"].shape[1:]) for _, cond in batch])
            to = {
                **options["transformer_options"],
                "cond_or_uncond": [i for i, _ in batch],
                "uuids": [cond["uuid"] for _, cond in batch],
                "sigmas": sigma,
            }
            made = model.apply_model(torch.cat([x] * len(batch)), torch.cat([sigma] * len(batch)), context, to)
            for (i, _), part in zip(batch, made.chunk(len(batch)), strict=True):
                out[i] = out[i] + part / len(conds[i])
    return out


class CFGGuider:
    """One sampling run after another of a model, with its conditions."""

    def __init__(self, model_patcher: ModelPatcher, positive: Any, negative: Any = None, cfg: float = 1.0) -> None:
        self.model_patcher, self.model_options, self.cfg = model_patcher, model_patcher.model_options, cfg
        branches = {"positive": positive, "negative": negative}
        self.conds = {name: None if c is None else self._listed(c) for name, c in branches.items()}

    @staticmethod
    def _listed(conds: Any) -> list[dict]:
        listed = conds if isinstance(conds, list) else [conds]
        return [{"uuid": uuid.uuid4(), **(c if isinstance(c, dict) else {"cross_attn": c})} for c in listed]

    def __call__(self, x: Any, timestep: Any, model_options: dict | None = None, seed: int | None = None) -> Any:
        call = wrapped(WrappersMP.PREDICT_NOISE, self.predict_noise, self, self.model_options)
        return call(x, timestep, model_options or {}, seed)

    def predict_noise(self, x: Any, timestep: Any, model_options: dict, seed: int | None = None) -> Any:
        alone = math.isclose(self.cfg, 1.0) and not model_options.get("disable_cfg1_optimization", False)
        conds = [self.conds["positive"], None if alone else self.conds["negative"]]
        call = wrapped(WrappersMP.CALC_COND_BATCH, calc_cond_batch, None, model_options)
        cond, uncond = call(self.inner_model, conds, x, timestep, model_options)
        for hook in model_options.get("sampler_post_cfg_function", []):
            hook({"uncond_denoised": uncond, "cond_denoised": cond})
        return cond if alone else uncond + (cond - uncond) * self.cfg

    def outer_sample(
        self, noise: Any, latent: Any, sampler: Any, sigmas: Any, mask: Any, callback: Any, pbar: bool, seed: Any
    ) -> Any:
        self.inner_model = self.model_patcher.model
        try:
            return self.inner_sample(noise, latent, sampler, sigmas.to(noise.device), mask, callback, pbar, seed)
        finally:
            del self.inner_model

    def inner_sample(
        self, noise: Any, latent: Any, sampler: Any, sigmas: Any, mask: Any, callback: Any, pbar: bool, seed: Any
    ) -> Any:
        options = copied(self.model_options)
        options.setdefault("transformer_options", {})["sample_sigmas"] = sigmas
        extra = {"model_options": options, "seed": seed}
        call = wrapped(WrappersMP.SAMPLER_SAMPLE, sampler.sample, sampler, options)
        return call(self, sigmas, extra, callback, noise, latent, mask, pbar)

    @torch.inference_mode()
    def sample(
        self,
        noise: Any,
        latent: Any,
        sampler: Any,
        sigmas: Any,
        denoise_mask: Any = None,
        callback: Any = None,
        disable_pbar: bool = False,
        seed: int | None = None,
    ) -> Any:
        before = self.model_options
        self.model_options = copied(before)
        keyed = self.model_options.setdefault("transformer_options", {}).setdefault("wrappers", {})
        keyed.update(copied(self.model_patcher.wrappers))
        try:
            call = wrapped(WrappersMP.OUTER_SAMPLE, self.outer_sample, self, self.model_options)
            return call(noise, latent, sampler, sigmas, denoise_mask, callback, disable_pbar, seed)
        finally:
            self.model_options = before


class Masked:
    """What samplers call: the guider, with what the mask leaves as it is put back."""

    def __init__(self, guider: CFGGuider, sigmas: Any) -> None:
        self.inner_model, self.sigmas, self.latent_image, self.noise = guider, sigmas, None, None

    def __call__(
        self, x: Any, sigma: Any, denoise_mask: Any = None, model_options: Any = None, seed: Any = None
    ) -> Any:
        if denoise_mask is None:
            return self.inner_model(x, sigma, model_options, seed)
        levels = sigma.reshape(-1, *(1,) * (x.ndim - 1))
        sampling = self.inner_model.inner_model.model_sampling
        x = x * denoise_mask + sampling.noise_scaling(levels, self.noise, self.latent_image) * (1 - denoise_mask)
        out = self.inner_model(x, sigma, model_options, seed)
        return out * denoise_mask + self.latent_image * (1 - denoise_mask)


class KSAMPLER:
    """A sampler as the program hands it around."""

    def __init__(
        self, sampler_function: Callable, extra_options: dict | None = None, inpaint_options: Any = None
    ) -> None:
        self.sampler_function, self.extra_options = sampler_function, extra_options or {}
        self.inpaint_options = inpaint_options or {}

    def sample(
        self, guider: Any, sigmas: Any, extra: dict, callback: Any, noise: Any, latent: Any, mask: Any, pbar: bool
    ) -> Any:
        extra["denoise_mask"] = mask
        model = Masked(guider, sigmas)
        model.latent_image, model.noise = latent, noise
        sampling = guider.inner_model.model_sampling
        x = sampling.noise_scaling(sigmas[0], noise, latent)
        told = None
        if callback is not None:
            told = lambda state: callback(state["i"], state["denoised"], state["x"], len(sigmas) - 1)  # noqa: E731
        x = self.sampler_function(model, x, sigmas, extra_args=extra, callback=told, disable=pbar, **self.extra_options)
        return sampling.inverse_noise_scaling(sigmas[-1], x)


def sampler_object(name: str, **options: Any) -> KSAMPLER:
    """The sampler of that name."""
    function = {"ddim": "euler", "uni_pc": "unipc", "uni_pc_bh2": "unipc_bh2"}.get(name, name)
    return KSAMPLER(globals()[f"sample_{function}"], options)


def simple(sampling: Any, steps: int) -> Any:
    """The scheduler "simple": every so many of the model's own levels, from the top, and 0."""
    own = sampling.sigmas
    return torch.tensor([float(own[-1 - int(i * len(own) / steps)]) for i in range(steps)] + [0.0])


def levels(sampling: Any, sampler: str, steps: int) -> Any:
    """The grid that a sampler gets for a number of steps: UniPC and DPM2 leave out the last level but one."""
    if sampler in ("dpm_2", "uni_pc", "uni_pc_bh2"):
        found = simple(sampling, steps + 1)
        return torch.cat([found[:-2], found[-1:]])
    return simple(sampling, steps)


# --- samplers -------------------------------------------------------------------------------------------------------


class _Asked:
    """The model and the callback, in the words of a sampler."""

    def __init__(self, model: Callable, extra: Any, callback: Any) -> None:
        self._model, self._extra, self._callback = model, extra or {}, callback

    def __call__(self, x: Any, sigma: Any, step: int | None = None) -> Any:
        denoised = self._model(x, sigma * x.new_ones([len(x)]), **self._extra)
        if self._callback is not None and step is not None:
            self._callback({"x": x, "i": step, "sigma": sigma, "sigma_hat": sigma, "denoised": denoised})
        return denoised

    def slope(self, x: Any, sigma: Any, step: int | None = None) -> Any:
        """The derivative by sigma that k-diffusion's samplers integrate."""
        return (x - self(x, sigma, step)) / sigma


def sample_euler(
    model: Any,
    x: Any,
    sigmas: Any,
    extra_args: Any = None,
    callback: Any = None,
    disable: Any = None,
    s_churn: float = 0.0,
) -> Any:
    """Karras et al., algorithm 2 without the correction."""
    ask = _Asked(model, extra_args, callback)
    for i in range(len(sigmas) - 1):
        at = sigmas[i] * (1 + min(s_churn / (len(sigmas) - 1), 2**0.5 - 1))
        if s_churn > 0:
            x = x + torch.randn_like(x) * (at**2 - sigmas[i] ** 2) ** 0.5
        x = x + (sigmas[i + 1] - at) * (x - ask(x, at, i)) / at
    return x


def sample_heun(
    model: Any, x: Any, sigmas: Any, extra_args: Any = None, callback: Any = None, disable: Any = None
) -> Any:
    """Karras et al., algorithm 2: the trapezoidal rule."""
    ask = _Asked(model, extra_args, callback)
    for i in range(len(sigmas) - 1):
        step = sigmas[i + 1] - sigmas[i]
        slope = ask.slope(x, sigmas[i], i)
        if sigmas[i + 1] > 0:
            ahead = x + step * slope
            slope = (slope + ask.slope(ahead, sigmas[i + 1])) / 2
        x = x + step * slope
    return x


def sample_dpm_2(
    model: Any, x: Any, sigmas: Any, extra_args: Any = None, callback: Any = None, disable: Any = None
) -> Any:
    """DPM-Solver-2 with the geometric mean as its midpoint."""
    ask = _Asked(model, extra_args, callback)
    for i in range(len(sigmas) - 1):
        slope = ask.slope(x, sigmas[i], i)
        if sigmas[i + 1] > 0:
            middle = (sigmas[i] * sigmas[i + 1]).sqrt()
            ahead = x + (middle - sigmas[i]) * slope
            slope = ask.slope(ahead, middle)
        x = x + (sigmas[i + 1] - sigmas[i]) * slope
    return x


def sample_lms(
    model: Any, x: Any, sigmas: Any, extra_args: Any = None, callback: Any = None, disable: Any = None, order: int = 4
) -> Any:
    """Linear multistep (Adams-Bashforth) on an uneven grid: the polynomial through the last slopes, integrated."""
    ask, grid, slopes = _Asked(model, extra_args, callback), [float(s) for s in sigmas], []
    nodes, at = (0.5 * torch.tensor([-1.0, 0.0, 1.0]) * (0.6**0.5) * 2, torch.tensor([5.0, 8.0, 5.0]) / 18)
    for i in range(len(grid) - 1):
        slopes.insert(0, ask.slope(x, sigmas[i], i))
        del slopes[order:]
        known, (a, b) = grid[i - len(slopes) + 1 : i + 1][::-1], grid[i : i + 2]
        for j, slope in enumerate(slopes):
            points = [(a + b) / 2 + float(t) * (b - a) / 2 for t in nodes]
            basis = [math.prod((p - o) / (known[j] - o) for k, o in enumerate(known) if k != j) for p in points]
            x = x + (b - a) * sum(float(w) * f for w, f in zip(at, basis, strict=True)) * slope
    return x


def sample_dpmpp_2m(
    model: Any, x: Any, sigmas: Any, extra_args: Any = None, callback: Any = None, disable: Any = None
) -> Any:
    """DPM-Solver++(2M), Lu et al. 2022, with lambda = -log sigma."""
    ask, before = _Asked(model, extra_args, callback), None
    for i in range(len(sigmas) - 1):
        denoised = new = ask(x, sigmas[i], i)
        if before is not None and sigmas[i + 1] > 0:
            ratio = (sigmas[i - 1] / sigmas[i]).log() / (sigmas[i] / sigmas[i + 1]).log()
            new = denoised + (denoised - before) / (2 * ratio)
        share = sigmas[i + 1] / sigmas[i]
        x, before = share * x + (1 - share) * new, denoised
    return x


def sample_unipc(
    model: Any,
    x: Any,
    sigmas: Any,
    extra_args: Any = None,
    callback: Any = None,
    disable: Any = None,
    variant: str = "bh1",
) -> Any:
    """UniPC-3, Zhao et al. 2023. It overwrites a last level of 0, in the caller's tensor."""
    ask = _Asked(model, extra_args, callback)
    if sigmas[-1] == 0:
        sigmas[-1] = 0.001
    last, lam = len(sigmas) - 1, -sigmas.log()
    order = min(3, len(sigmas) - 2)
    known = [(lam[0], ask(x, sigmas[0], 0))]  # newest last
    for i in range(1, last + 1):
        p = min(i, order, last + 1 - i)
        (at, newest), older = known[-1], known[-p:-1][::-1]
        h = lam[i] - at
        ratios = torch.tensor([float((place - at) / h) for place, _ in older] + [1.0])
        changes = [(value - newest) / float((place - at) / h) for place, value in older]
        phi, factorial, rows, right = torch.expm1(-h) / -h - 1, 1.0, [], []
        scale = -h if variant == "bh1" else torch.expm1(-h)
        for k in range(1, p + 1):
            rows.append(ratios ** (k - 1))
            right.append(float(phi * factorial / scale))
            factorial *= k + 1
            phi = phi / -h - 1 / factorial
        matrix, wanted = torch.stack(rows), torch.tensor(right)
        base = sigmas[i] / sigmas[i - 1] * x - torch.expm1(-h) * newest
        predictor = [0.5] if p == 2 else torch.linalg.solve(matrix[:-1, :-1], wanted[:-1]).tolist() if p > 2 else []
        x = base - scale * sum((w * c for w, c in zip(predictor, changes, strict=True)), torch.zeros_like(base))
        if i < last:
            found = ask(x, sigmas[i], i)
            corrector = [0.5] if p == 1 else torch.linalg.solve(matrix, wanted).tolist()
            x = base - scale * sum(w * c for w, c in zip(corrector, [*changes, found - newest], strict=True))
            known.append((lam[i], found))
    return x


def sample_unipc_bh2(model: Any, x: Any, sigmas: Any, **more: Any) -> Any:
    return sample_unipc(model, x, sigmas, variant="bh2", **more)


def sample_euler_ancestral(
    model: Any, x: Any, sigmas: Any, extra_args: Any = None, callback: Any = None, disable: Any = None, eta: float = 1.0
) -> Any:
    """Euler's method to a level below the next one, and noise up to that."""
    ask = _Asked(model, extra_args, callback)
    for i in range(len(sigmas) - 1):
        a, b = sigmas[i], sigmas[i + 1]
        up = torch.minimum(b, eta * (b**2 * (a**2 - b**2) / a**2) ** 0.5)
        down = (b**2 - up**2) ** 0.5
        x = x + (down - a) * (x - ask(x, a, i)) / a
        x = x + up * torch.randn_like(x) if b > 0 else x
    return x


def sample_dpmpp_2m_sde(
    model: Any, x: Any, sigmas: Any, extra_args: Any = None, callback: Any = None, disable: Any = None, eta: float = 1.0
) -> Any:
    """DPM-Solver++(2M) for the SDE; a first level of 1 is moved, as a flow has no finite lambda there."""
    sigmas = sigmas.clone()
    sigmas[0] = min(float(sigmas[0]), 0.9999)
    ask, before = _Asked(model, extra_args, callback), None
    for i in range(len(sigmas) - 1):
        denoised = new = ask(x, sigmas[i], i)
        if sigmas[i + 1] == 0:
            return denoised
        h = (sigmas[i] / sigmas[i + 1]).log()
        if before is not None:
            new = denoised + (denoised - before) * h / (2 * (sigmas[i - 1] / sigmas[i]).log())
        x = sigmas[i + 1] / sigmas[i] * torch.exp(-h * eta) * x - torch.expm1(-h * (1 + eta)) * new
        x = x + sigmas[i + 1] * (-torch.expm1(-2 * h * eta)).sqrt() * torch.randn_like(x)
        before = denoised
    return x


def sample_euler_cfg_pp(
    model: Any, x: Any, sigmas: Any, extra_args: Any = None, callback: Any = None, disable: Any = None
) -> Any:
    """CFG++, Chung et al. 2024: noise from the unconditional branch, which a hook on the guider hands over."""
    seen: dict[str, Any] = {}
    extra_args = copy.copy(extra_args)
    options = extra_args["model_options"] = copied(extra_args["model_options"])
    options.setdefault("sampler_post_cfg_function", []).append(seen.update)
    options["disable_cfg1_optimization"] = True
    ask = _Asked(model, extra_args, callback)
    for i in range(len(sigmas) - 1):
        denoised = ask(x, sigmas[i], i)
        x = denoised + sigmas[i + 1] * (x - seen["uncond_denoised"]) / sigmas[i]
    return x
