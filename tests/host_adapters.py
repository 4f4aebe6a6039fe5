"""What ``tests/test_host_contract.py`` runs: one adapter for each host, over the same tiny denoiser and the same words.

A host of one's own joins by one more class in :data:`HOSTS`.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import unicp
from tests import comfy_stand_in as comfy
from tests.family import part
from tests.tiny import FAMILIES, wan_transformer
from tests.tiny_modular import MODULAR
from unicp import BudgetConfig, Run
from unicp.hosts import sglang, vllm_omni

Refusal = tuple[Callable[[], Any], str]
"""Something that cannot work, and what is said of it."""


def embeds(prompts: tuple[int, ...], negative: bool = False) -> torch.Tensor:
    """Prompts are numbers: (B, 8, 16)."""
    seeds = [prompt + 100 * negative for prompt in prompts]
    return torch.stack([torch.randn(8, 16, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def noise(prompts: tuple[int, ...], size: int) -> torch.Tensor:
    return torch.randn(len(prompts), 4, 3, size // 8, size // 8, generator=torch.Generator().manual_seed(0))


class Host:
    """One host with a model of its own. Two of a class are equal.

    Attributes:
        denoiser: what is to run less often; its weights may be changed between videos.
        branches: calls of it a step.
        methods: that it takes.
    """

    denoiser: torch.nn.Module
    branches = 2
    methods: tuple[str, ...] = ("budget", "schedule")

    def put(self, config: Any) -> None:
        """Accelerate what comes."""
        raise NotImplementedError

    def take(self) -> None:
        """As if nothing had been."""
        raise NotImplementedError

    def make(self, *, prompts: tuple[int, ...] = (1,), size: int = 32, steps: int = 10) -> torch.Tensor:
        """A video's latents."""
        raise NotImplementedError

    def report(self) -> dict[str, Any]:
        """What was done for the last video, as :meth:`unicp.SessionReport.to_dict` has it."""
        raise NotImplementedError

    def refused(self) -> list[Refusal]:
        """What it refuses. Each is tried on a host of its own."""
        raise NotImplementedError


class Diffusers(Host):
    """``unicp.accelerate`` on an ordinary pipeline."""

    def __init__(self) -> None:
        self.pipe = FAMILIES["wan"].build()
        self.pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        self.denoiser = self.pipe.transformer
        self.session: Any = None

    def put(self, config: Any) -> None:
        self.session = unicp.accelerate(self.pipe, config)

    def take(self) -> None:
        unicp.restore(self.pipe)

    def make(self, *, prompts: tuple[int, ...] = (1,), size: int = 32, steps: int = 10) -> torch.Tensor:
        return FAMILIES["wan"].generate(self.pipe, prompts=prompts, size=size, steps=steps)

    def report(self) -> dict[str, Any]:
        return dict(self.session.report().to_dict())

    def refused(self) -> list[Refusal]:
        return [(lambda: self.put(BudgetConfig(min_psnr=30)), "min_psnr needs a profile")]


class Guider(Host):
    """A guider in a modular pipeline."""

    def __init__(self) -> None:
        part("WanModularPipeline")
        self.pipe = MODULAR["wan"].build()
        self.pipe.update_components(scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0))
        self.denoiser = self.pipe.transformer

    def put(self, config: Any) -> None:
        from unicp.hosts.guider import FillGuider

        self.pipe.update_components(guider=FillGuider(self.pipe.guider, config, self.pipe))

    def take(self) -> None:
        self.pipe.update_components(guider=self.pipe.guider.guider)

    def make(self, *, prompts: tuple[int, ...] = (1,), size: int = 32, steps: int = 10) -> torch.Tensor:
        made: torch.Tensor = self.pipe(
            prompt_embeds=embeds(prompts),
            negative_prompt_embeds=embeds(prompts, negative=True),
            num_inference_steps=steps,
            height=size,
            width=size,
            num_frames=9,
            generator=torch.Generator().manual_seed(0),
            output="latents",
        )
        return made

    def report(self) -> dict[str, Any]:
        return dict(self.pipe.guider.report().to_dict())

    def refused(self) -> list[Refusal]:
        return [
            (lambda: self.put(unicp.AdaCacheConfig()), "adacache looks into the blocks"),
            (lambda: self.put(BudgetConfig(min_psnr=30)), "min_psnr needs a profile"),
        ]


class OwnLoop(Host):
    """A ``Run`` in a loop of one's own."""

    def __init__(self) -> None:
        self.denoiser = wan_transformer()
        self.config: Any = None
        self.run: Any = None

    def put(self, config: Any) -> None:
        self.config = config

    def take(self) -> None:
        self.config = None

    @torch.no_grad()
    def make(self, *, prompts: tuple[int, ...] = (1,), size: int = 32, steps: int = 10) -> torch.Tensor:
        latents, sigmas = noise(prompts, size), [1 - i / steps for i in range(steps + 1)]
        lengths = [b - a for a, b in pairwise(sigmas)]
        self.run = None if self.config is None else Run(self.config, sigmas, weights=lengths)
        words = {"cond": embeds(prompts), "uncond": embeds(prompts, negative=True)}
        for i, length in enumerate(lengths):
            outputs = []
            for branch, text in words.items():

                def compute(latents: Any = latents, i: int = i, text: Any = text) -> Any:
                    return self.denoiser(latents, torch.full((len(latents),), 1000 * sigmas[i]), text).sample

                outputs.append(compute() if self.run is None else self.run.step(i, branch, compute))
            latents = latents + length * (outputs[1] + 4 * (outputs[0] - outputs[1]))
        return latents

    def report(self) -> dict[str, Any]:
        return dict(self.run.report().to_dict())

    def refused(self) -> list[Refusal]:
        return [
            (lambda: (self.put(unicp.AdaCacheConfig()), self.make()), "adacache looks into the blocks"),
            (lambda: (self.put(BudgetConfig(profile="x.safetensors")), self.make()), "a Run takes no profile"),
        ]


# --- SGLang-Diffusion -----------------------------------------------------------------------------------------------


class Stage:
    """Shaped as SGLang's denoising stage: its names, and arguments of its prediction; everything else plain."""

    _cache_dit_enabled = False

    def __init__(self, transformer: Any, second: Any = None) -> None:
        self.transformer, self.transformer_2 = transformer, second
        self.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        self.sp = 1

    def _sp_world_size(self) -> int:
        return self.sp

    def _predict_noise_with_cfg(
        self,
        current_model: Any,
        latent_model_input: Any,
        timestep: Any,
        batch: Any,
        timestep_index: int,
        attn_metadata: Any,
        target_dtype: Any,
        current_guidance_scale: Any,
        cfg_policy: Any,
        cfg_gate_state: Any,
        server_args: Any,
        guidance: Any,
        latents: Any,
    ) -> Any:
        cond, uncond = (current_model(latent_model_input, timestep, text).sample for text in cfg_policy)
        return uncond + current_guidance_scale * (cond - uncond)

    @torch.no_grad()
    def forward(self, batch: Any, server_args: Any) -> torch.Tensor:
        latents, scheduler = batch.latents, self.scheduler
        scheduler.set_timesteps(batch.steps)
        scheduler.set_begin_index(0)
        batch.timesteps = scheduler.timesteps
        for i, t in enumerate(scheduler.timesteps):
            late = self.transformer_2 is not None and i >= len(scheduler.timesteps) // 2
            velocity = self._predict_noise_with_cfg(
                current_model=self.transformer_2 if late else self.transformer,
                latent_model_input=latents,
                timestep=t.expand(len(latents)),
                batch=batch,
                timestep_index=i,
                attn_metadata=None,
                target_dtype=torch.float32,
                current_guidance_scale=4.0,
                cfg_policy=batch.words,
                cfg_gate_state=None,
                server_args=server_args,
                guidance=None,
                latents=latents,
            )
            latents = scheduler.step(velocity, t, latents, return_dict=False)[0]
        return latents


def hooked(stage: Any) -> Any:
    """What SGLang's registry makes of a method and a hook around it, on this stage alone."""
    plain = type(stage)._predict_noise_with_cfg
    stage._predict_noise_with_cfg = lambda *args, **kwargs: sglang.predict(plain, stage, *args, **kwargs)
    return stage


class SGLang(Host):
    """The plug-in's hook, on an object that is shaped as its stage."""

    def __init__(self) -> None:
        self.denoiser = wan_transformer()
        self.stage = hooked(Stage(self.denoiser))
        self.asked: dict[str, Any] = {}
        self.server = SimpleNamespace(enable_cfg_parallel=False, enable_breakable_cuda_graph=False)
        self.batch: Any = None

    def put(self, config: Any) -> None:
        self.asked = {"diffusers_kwargs": {"unicp": config}}

    def take(self) -> None:
        self.asked = {}

    def request(self, prompts: tuple[int, ...] = (1,), size: int = 32, steps: int = 10, warm: bool = False) -> Any:
        return SimpleNamespace(
            latents=noise(prompts, size),
            words=(embeds(prompts), embeds(prompts, negative=True)),
            steps=steps,
            is_warmup=warm,
            scheduler=None,
            timesteps=None,
            extra=dict(self.asked),
        )

    def make(self, *, prompts: tuple[int, ...] = (1,), size: int = 32, steps: int = 10) -> torch.Tensor:
        self.batch = self.request(prompts, size, steps)
        return self.stage.forward(self.batch, self.server)

    def report(self) -> dict[str, Any]:
        return dict(self.batch.extra[sglang.REPORT])

    def refused(self) -> list[Refusal]:
        def with_(where: Any, name: str, value: Any) -> Callable[[], Any]:
            return lambda: (setattr(where, name, value), self.put(2), self.make())

        return [
            (with_(self.stage, "sp", 2), "sequence parallelism"),
            (with_(self.server, "enable_cfg_parallel", True), "guidance branches run in processes of their own"),
            (with_(self.server, "enable_breakable_cuda_graph", True), "captured CUDA graphs"),
            (with_(self.stage, "_cache_dit_enabled", True), "another cache acts on the model"),
            (lambda: (self.put("fast"), self.make()), "unicp takes a speed-up, as in 2"),
            (lambda: (self.put({"method": "adacache"}), self.make()), "adacache looks into the blocks"),
            (
                lambda: (self.put({"profile": "x.safetensors"}), self.make()),
                "this server has no folder of profiles",
            ),
        ]


# --- vLLM-Omni ------------------------------------------------------------------------------------------------------


class OmniPipeline(torch.nn.Module):
    """Shaped as a pipeline of vLLM-Omni: a module with a transformer, a scheduler and its loop."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = wan_transformer()
        self.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        self.od_config = SimpleNamespace(
            parallel_config=SimpleNamespace(sequence_parallel_size=1, cfg_parallel_size=1, pipeline_parallel_size=1)
        )

    @torch.no_grad()
    def forward(self, prompts: tuple[int, ...], size: int, steps: int) -> torch.Tensor:
        latents, words = noise(prompts, size), (embeds(prompts), embeds(prompts, negative=True))
        self.scheduler.set_timesteps(steps)
        for t in self.scheduler.timesteps:
            timestep = t.expand(len(latents))
            cond, uncond = (
                self.transformer(hidden_states=latents, timestep=timestep, encoder_hidden_states=text).sample
                for text in words
            )
            latents = self.scheduler.step(uncond + 4 * (cond - uncond), t, latents, return_dict=False)[0]
        return latents


class VllmOmni(Host):
    """The cache backend, as vLLM-Omni's runner uses it."""

    def __init__(self) -> None:
        self.pipe = OmniPipeline().eval()
        self.denoiser = self.pipe.transformer
        self.backend: Any = None
        self.choose = vllm_omni.answering(lambda name, config: None)

    def put(self, config: Any) -> None:
        self.take()
        self.backend = self.choose("unicp", config if isinstance(config, dict) else config.to_dict())
        self.backend.enable(self.pipe)

    def take(self) -> None:
        if self.backend is not None and self.backend.session is not None:
            self.backend.session.restore()
        self.backend = self.choose(None, {})

    def make(self, *, prompts: tuple[int, ...] = (1,), size: int = 32, steps: int = 10) -> torch.Tensor:
        if self.backend is not None and self.backend.is_enabled():
            self.backend.refresh(self.pipe, steps)
        made: torch.Tensor = self.pipe(prompts, size, steps)
        return made

    def report(self) -> dict[str, Any]:
        return dict(self.backend.report().to_dict())

    def refused(self) -> list[Refusal]:
        parallel = self.pipe.od_config.parallel_config

        def with_(name: str) -> Callable[[], Any]:
            return lambda: (setattr(parallel, name, 2), self.put({"target_speedup": 2}))

        return [
            (with_("sequence_parallel_size"), "does not go together with sequence_parallel_size=2"),
            (with_("cfg_parallel_size"), "does not go together with cfg_parallel_size=2"),
            (with_("pipeline_parallel_size"), "does not go together with pipeline_parallel_size=2"),
            (lambda: self.put({"method": "unicp"}), "unicp looks into the blocks"),
            (lambda: self.put({"target_speed": 2}), "unknown field of BudgetConfig 'target_speed'"),
            (lambda: self.put({"profile": "x"}), "this server has no folder of profiles"),
            (lambda: self.choose("unicp", {}).enable(torch.nn.Linear(1, 1)), "Linear has no transformer"),
        ]


class ComfyUI(Host):
    """The wrappers of the speed node on a model, under Euler; memory is short, so that branches are called apart."""

    methods = ("budget",)

    def __init__(self) -> None:
        comfy.install()
        self.denoiser = wan_transformer()
        self.sampling = comfy.Flow(shift=3.0)
        model = comfy.Model(self._velocity, self.sampling, together=False)
        self.plain = self.patcher = comfy.ModelPatcher(model)
        self.sampler = "euler"

    def _velocity(self, x: Any, sigma: Any, context: Any) -> Any:
        return self.denoiser(x, 1000 * sigma, context, return_dict=False)[0]

    def put(self, config: Any) -> None:
        from unicp.hosts.comfyui.nodes import KEY, Speedup, predict_noise

        self.wrapper = Speedup(config)
        self.patcher = self.plain.clone()
        self.patcher.add_wrapper_with_key("outer_sample", KEY, self.wrapper.outer_sample)
        self.patcher.add_wrapper_with_key("predict_noise", KEY, predict_noise)

    def take(self) -> None:
        self.patcher = self.plain

    @torch.inference_mode()
    def make(self, *, prompts: tuple[int, ...] = (1,), size: int = 32, steps: int = 10) -> torch.Tensor:
        guider = comfy.CFGGuider(self.patcher, embeds(prompts), embeds(prompts, negative=True), 4.0)
        start = noise(prompts, size)
        grid = comfy.levels(self.sampling, self.sampler, steps)
        made: torch.Tensor = guider.sample(start, torch.zeros_like(start), comfy.sampler_object(self.sampler), grid)
        return made

    def report(self) -> dict[str, Any]:
        session = self.wrapper.fresh()[-1].session
        assert session is not None
        return dict(session.to_dict())

    def refused(self) -> list[Refusal]:
        def sampled(name: str) -> Callable[[], Any]:
            return lambda: (self.put(BudgetConfig(target_speedup=2)), setattr(self, "sampler", name), self.make())

        return [
            (sampled("euler_ancestral"), "the sampler euler_ancestral draws noise at its steps"),
            (sampled("euler_cfg_pp"), "the sampler euler_cfg_pp reads the unconditional result at every step"),
        ]


HOSTS: dict[str, type[Host]] = {
    "comfyui": ComfyUI,
    "diffusers": Diffusers,
    "guider": Guider,
    "own-loop": OwnLoop,
    "sglang": SGLang,
    "vllm-omni": VllmOmni,
}
