"""Whether a call is a step of a sampling run: training, other caches, caches of keys, shards; and what was swapped."""

from __future__ import annotations

import types
import warnings
from typing import Any

import pytest
import torch
from diffusers import AnyFlowFARTransformer3DModel, FirstBlockCacheConfig

import unicp
from tests.contract import plain, quietly
from tests.tiny import FAMILIES, wan_transformer
from tests.tiny_parts import WAN as WAN_SIZES
from tests.tiny_parts import model
from unicp.errors import UnicpError, UnicpWarning
from unicp.hosts.diffusers import parallel

WAN = FAMILIES["wan"]
BUDGET = unicp.BudgetConfig(target_speedup=2)
STACK = unicp.AdaCacheConfig(codebook=((1e9, 3),))
both = pytest.mark.parametrize("config", [BUDGET, STACK], ids=lambda config: config.method)


def scored(transformer: Any, inputs_only: bool = False) -> list[torch.Tensor]:
    """One sample at several noise levels, as training and scoring do, with what comes back to the weights or inputs."""
    x = torch.randn(1, 4, 3, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_(inputs_only)
    e = torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(1))
    found = []
    for t in (900.0, 700.0, 500.0, 300.0):
        call = {"hidden_states": x, "timestep": torch.tensor([t]), "encoder_hidden_states": e, "return_dict": False}
        found.append(transformer(**call)[0])
    return found


@both
@pytest.mark.parametrize("how", ["train", "eval", "inputs"])
def test_training_runs_the_plain_model(config: Any, how: str) -> None:
    pipe, twin = WAN.build(), wan_transformer()
    session = unicp.accelerate(pipe, config)
    video = quietly(lambda: WAN.generate(pipe))
    for transformer in (pipe.transformer, twin):
        transformer.train(how == "train").requires_grad_(how != "inputs")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        outputs = scored(pipe.transformer, how == "inputs")
    for out, wanted in zip(outputs, scored(twin, how == "inputs"), strict=True):
        assert out.requires_grad and torch.equal(out, wanted)
    said = [str(w.message) for w in caught if issubclass(w.category, UnicpWarning)]
    assert len(said) == 1 and "no_grad" in said[0]
    # A validation video in between is accelerated as before.
    pipe.transformer.eval()
    assert torch.equal(quietly(lambda: WAN.generate(pipe)), video) and len(session.reports) == 2


@both
def test_training_in_the_middle_of_a_run_leaves_the_run_alone(config: Any) -> None:
    pipe, other = WAN.build(), WAN.build()
    for each in (pipe, other):
        unicp.accelerate(each, config)
    wanted = quietly(lambda: WAN.generate(other))

    def train(one: Any, i: int, t: Any, tensors: Any) -> Any:
        if i in (3, 4):
            with torch.enable_grad():
                scored(one.transformer)
        return tensors

    assert torch.equal(quietly(lambda: WAN.generate(pipe, callback=train)), wanted)


@both
def test_the_same_latents_at_other_noise_levels_are_no_steps(config: Any) -> None:
    """Scoring without gradients: a sampler's latents change from step to step."""
    transformer, twin = wan_transformer(), wan_transformer()
    session = unicp.accelerate(transformer, config)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UnicpWarning)
        for out, wanted in zip(scored(transformer), scored(twin), strict=True):
            assert torch.equal(out, wanted)
        assert config is BUDGET or any("same latents" in note for note in session.report().notes)


@pytest.mark.parametrize("config", [BUDGET, STACK, unicp.ScheduleConfig(interval=2)], ids=lambda c: c.method)
def test_a_model_that_keeps_keys_is_refused(config: Any) -> None:
    far = model("AnyFlowFARTransformer3DModel", **WAN_SIZES, chunk_partition=(1, 2, 2), full_chunk_limit=3)
    assert isinstance(far, AnyFlowFARTransformer3DModel)
    with pytest.raises(UnicpError, match="cache of keys"):
        unicp.accelerate(far, config)


def test_a_call_with_a_cache_of_keys_is_computed() -> None:
    class Keeping(torch.nn.Module):
        calls = 0

        def forward(self, hidden_states: Any, timestep: Any, kv_cache: Any = None) -> Any:
            self.calls += 1
            return hidden_states * 0.9

    keeping = Keeping().eval()
    unicp.accelerate(keeping, unicp.ScheduleConfig(interval=3))
    with torch.no_grad(), pytest.warns(UnicpWarning, match="kv_cache"):
        for t in torch.linspace(1000, 100, 10):
            keeping(torch.randn(1, 4), t[None], kv_cache=[{}])
    assert keeping.calls == 10


@both
def test_another_cache_is_refused_by_name(config: Any) -> None:
    pipe = WAN.build()
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.3))
    with pytest.raises(UnicpError, match=r"FirstBlockCache.*disable_cache"):
        unicp.accelerate(pipe, config)
    pipe.transformer.disable_cache()
    unicp.accelerate(pipe, config)
    quietly(lambda: WAN.generate(pipe))
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.3))  # afterwards: at the next run
    with pytest.raises(UnicpError, match=r"FirstBlockCache.*disable_cache"):
        WAN.generate(pipe)
    pipe.transformer.disable_cache()
    quietly(lambda: WAN.generate(pipe))


def test_cache_dit_is_refused_by_name() -> None:
    pipe = WAN.build()
    pipe.transformer._is_cached = True  # what cache-dit leaves on a transformer
    with pytest.raises(UnicpError, match=r"cache-dit.*disable_cache"):
        unicp.accelerate(pipe, BUDGET)


def test_sharded_weights_that_would_decide_apart_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (2,))
        pipe = WAN.build()
        assert parallel.shards_of(pipe.transformer) is None
        for block in pipe.transformer.blocks:
            fully_shard(block, mesh=mesh)
        assert parallel.shards_of(pipe.transformer) is not None
        with pytest.raises(UnicpError, match="sharded over processes"):
            unicp.accelerate(pipe, STACK)
        unicp.accelerate(pipe, unicp.ScheduleConfig(interval=2))  # the same on all
        unicp.accelerate(pipe, BUDGET)  # what it measures is shared
        unicp.accelerate(pipe, STACK, group=mesh.get_group())
        unicp.restore(pipe)
        accelerated = WAN.build()
        unicp.accelerate(accelerated, STACK)
        for block in accelerated.transformer.blocks:  # afterwards: at the next run
            fully_shard(block, mesh=mesh)
        with pytest.raises(UnicpError, match="sharded over processes"):
            WAN.generate(accelerated)
    finally:
        torch.distributed.destroy_process_group()


def test_after_a_video_that_was_not_accelerated_the_report_says_that_it_is_an_earlier_ones() -> None:
    pipe = WAN.build()
    transformer = pipe.transformer
    session = unicp.accelerate(pipe, BUDGET)
    quietly(lambda: WAN.generate(pipe))
    assert session.report().computed_steps == 5
    transformer.train()
    quietly(lambda: WAN.generate(pipe))
    with pytest.warns(UnicpWarning, match="earlier video: .*training"):
        session.report()
    transformer.eval()
    quietly(lambda: WAN.generate(pipe))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnicpWarning)
        session.report()
    ours = transformer.forward
    transformer.forward = types.MethodType(type(transformer).forward, transformer)  # a patch that drops what was there
    quietly(lambda: WAN.generate(pipe))
    with pytest.warns(UnicpWarning, match="earlier video: forward of transformer was replaced"):
        session.report()
    transformer.forward = lambda *args, **kwargs: ours(*args, **kwargs)  # one that calls it
    quietly(lambda: WAN.generate(pipe))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnicpWarning)
        assert session.report().computed_steps == 5
    assert session.made == 3


def test_a_swapped_denoiser_is_said_and_the_old_one_restored() -> None:
    pipe = WAN.build()
    session = unicp.accelerate(pipe, BUDGET)
    old, pipe.transformer = pipe.transformer, wan_transformer(seed=3)
    quietly(lambda: WAN.generate(pipe))
    with pytest.raises(UnicpError, match=r"transformer of the pipeline is another module.*accelerate the"):
        session.report()
    unicp.restore(pipe)
    assert not hasattr(old, "_diffusers_hook")
    pipe.transformer = old
    session = unicp.accelerate(pipe, BUDGET)
    quietly(lambda: WAN.generate(pipe))
    pipe.transformer = wan_transformer(seed=3)
    with pytest.warns(UnicpWarning, match="earlier video"):
        session.report()
    session = unicp.accelerate(pipe, BUDGET)
    assert not hasattr(old, "_diffusers_hook")
    quietly(lambda: WAN.generate(pipe))
    assert session.report().computed_steps == 5


def test_a_foreign_class_named_like_a_known_one_is_refused_in_a_sentence() -> None:
    class WanTransformer3DModel(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = torch.nn.ModuleList([torch.nn.Linear(4, 4) for _ in range(3)])

        def forward(self, hidden_states: Any, timestep: Any) -> Any:
            return hidden_states

    with pytest.raises(UnicpError, match=r"not built as the spec of the family 'wan' says"):
        unicp.accelerate(WanTransformer3DModel(), unicp.AdaCacheConfig(metric_kind="self_attention"))


def test_an_accelerated_model_after_all_this_is_the_plain_one_again() -> None:
    pipe = WAN.build()
    session = unicp.accelerate(pipe, STACK)
    quietly(lambda: WAN.generate(pipe))
    session.restore()
    assert torch.equal(WAN.generate(pipe), plain("wan"))
