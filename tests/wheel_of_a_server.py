"""Run in a process of its own: the unpacked wheel of a server, loaded as far as its plug-ins go.

``python -m tests.wheel_of_a_server sglang|vllm-omni FOLDER``. What the wheels ask for (CUDA stacks) is not there:
packages are made without running their ``__init__``, and names from elsewhere stand empty. Their loader, their registry
and their choice of a cache backend are their own code.
"""

from __future__ import annotations

import ast
import inspect
import sys
import types
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock


def bare(name: str, folder: Path) -> None:
    """A package whose modules are found, and whose ``__init__`` is not run."""
    package = types.ModuleType(name)
    package.__path__ = [str(folder.joinpath(*name.split(".")))]
    sys.modules[name] = package


def empty(name: str, **names: Any) -> types.ModuleType:
    module = sys.modules[name] = types.ModuleType(name)
    module.__dict__.update(names)
    return module


def found(file: Path, *path: str) -> ast.AST:
    """A class, or a method of one, in a source file."""
    node: Any = ast.parse(file.read_text("utf-8"))
    for name in path:
        node = next(child for child in node.body if getattr(child, "name", None) == name)
    return node


def sglang(folder: Path) -> None:
    from tests.host_adapters import Stage
    from unicp.hosts import sglang as ours

    sys.modules["zmq"] = MagicMock()
    for name in ("sglang", "sglang.srt", "sglang.multimodal_gen"):
        bare(name, folder)
    from sglang.multimodal_gen.runtime.platforms import plugins

    plugins.load_plugins()
    ((kind, hook, source),) = plugins.HookRegistry._hooks[ours.TARGET]
    assert (kind, hook, source.plugin_name) == (plugins.HookType.AROUND, ours.predict, "unicp")

    module, _, path = ours.TARGET.partition(".DenoisingStage")
    stage = folder.joinpath(*module.split(".")).with_suffix(".py")
    method: Any = found(stage, "DenoisingStage", path.lstrip("."))
    assert [arg.arg for arg in method.args.args] == list(inspect.signature(Stage._predict_noise_with_cfg).parameters)
    names = {node.attr for node in ast.walk(found(stage, "DenoisingStage")) if isinstance(node, ast.Attribute)}
    assert {"_cache_dit_enabled", "transformer_2", "scheduler", "enable_cfg_parallel"} <= names
    assert "enable_breakable_cuda_graph" in names and found(stage, "DenoisingStage", "_sp_world_size")
    request: Any = found(stage.parent.parent / "schedule_batch.py", "Req")
    fields = {node.target.id for node in request.body if isinstance(node, ast.AnnAssign)}
    assert {"extra", "is_warmup", "scheduler", "timesteps"} <= fields
    runtime = folder / "sglang/multimodal_gen/runtime"
    arguments: Any = found(runtime / "server_args/server_args.py", "ServerArgs")
    fields = {node.target.id for node in arguments.body if isinstance(node, ast.AnnAssign)}
    assert {"model_path", "component_paths"} <= fields
    assert found(runtime / "models/schedulers/scheduling_flow_unipc_multistep.py", "FlowUniPCMultistepScheduler")
    assert found(runtime / "pipelines/ltx_2_pipeline.py", "LTX2FlowMatchScheduler")


def vllm_omni(folder: Path) -> None:
    import dataclasses

    from unicp import ScheduleConfig

    empty("vllm")
    empty("vllm.envs", VLLM_PLUGINS=None)
    empty("vllm.plugins", load_general_plugins=lambda: None)
    sys.modules["vllm"].envs = sys.modules["vllm.envs"]  # type: ignore[attr-defined]
    cache = "vllm_omni.diffusion.cache"
    for name in ("vllm_omni", "vllm_omni.diffusion", cache):
        bare(name, folder)
    own: dict[str, Any] = {"Any": Any, "dataclass": dataclasses.dataclass, "field": dataclasses.field}
    own["fields"] = dataclasses.fields
    source = found(folder / "vllm_omni/diffusion/data.py", "DiffusionCacheConfig")
    exec(ast.unparse(source), own)
    empty("vllm_omni.diffusion.data", DiffusionCacheConfig=own["DiffusionCacheConfig"])
    for kind in (
        "cachedit:CacheDiT",
        "magcache:MagCache",
        "seacache:SeaCache",
        "stepcache:StepCache",
        "teacache:TeaCache",
    ):
        module, _, name = kind.partition(":")
        empty(f"{cache}.{module}", **{f"{name}Backend": type(name, (), {"__init__": lambda self, config: None})})
    from vllm_omni.diffusion.cache import selector

    # The runner has the function by name before plug-ins are loaded.
    runner = empty("vllm_omni.diffusion.worker.diffusion_model_runner", get_cache_backend=selector.get_cache_backend)
    from vllm_omni import plugins

    plugins.load_omni_general_plugins()
    for place in (selector, runner):
        backend = place.get_cache_backend("unicp", own["DiffusionCacheConfig"].from_dict({"target_speedup": 3}))
        assert backend._acting.target_speedup == 3
        backend = place.get_cache_backend("unicp", {"method": "schedule", "interval": 3})
        assert backend._acting == ScheduleConfig(interval=3)
        assert type(place.get_cache_backend("tea_cache", {})).__name__ == "TeaCache"
        assert place.get_cache_backend("none", {}) is None
    base: Any = found(folder / "vllm_omni/diffusion/cache/base.py", "CacheBackend")
    for name in ("enable", "refresh", "is_enabled"):
        wanted = [
            arg.arg for arg in found(folder / "vllm_omni/diffusion/cache/base.py", "CacheBackend", name).args.args
        ]  # type: ignore[attr-defined]
        assert wanted == list(inspect.signature(getattr(type(backend), name)).parameters), name
    assert base
    settings: Any = found(folder / "vllm_omni/diffusion/data.py", "OmniDiffusionConfig")
    assert "model" in {node.target.id for node in settings.body if isinstance(node, ast.AnnAssign)}
    models = folder / "vllm_omni/diffusion/models"
    assert found(models / "schedulers/scheduling_flow_unipc_multistep.py", "FlowUniPCMultistepScheduler")
    assert found(models / "wan2_2/scheduling_wan_euler.py", "WanEulerScheduler")
    text = (folder / "vllm_omni/diffusion/worker/diffusion_model_runner.py").read_text("utf-8")
    for use in ("import get_cache_backend", "get_cache_backend(self.od_config.cache_backend", "cache_backend.refresh("):
        assert use in text


if __name__ == "__main__":
    {"sglang": sglang, "vllm-omni": vllm_omni}[sys.argv[1]](Path(sys.argv[2]))
    print("as found in the wheel")
