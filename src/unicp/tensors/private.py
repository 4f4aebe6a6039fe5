"""What unicp uses of torch, diffusers and accelerate that they do not call public, each with the reason.

None of these names is written anywhere else (``tests/test_house.py``). A new release may move any of them: the tests of
hooks, compiling, leaping and parallel runs notice, and so does ``make test-compat`` with the oldest release.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch._C._dynamo.eval_frame import set_eval_frame as set_eval_frame  # to leave compiled code, and to come back
from torch._dynamo.decorators import skip
from torch._dynamo.exc import Unsupported as Unsupported  # what fullgraph=True ends in where we decide
from torch._ops import HigherOrderOperator as HigherOrderOperator  # operators whose arguments are functions
from torch.utils import _python_dispatch as dispatch  # its modes have no public place
from torch.utils import _pytree as pytree  # diffusers registers its outputs there, and in no public place

__all__ = ["HigherOrderOperator", "Unsupported", "dispatch", "pytree", "set_eval_frame"]

COMPILED_CALL = "_compiled_call_impl"
"""Where ``torch.nn.Module.compile`` puts what is called instead of the module. The same since torch 2.1."""
COMPILED_ORIGINAL = "_orig_mod"
"""The module that ``torch.compile(module)`` wraps."""
HOOK_REGISTRY = "_diffusers_hook"
"""Where diffusers keeps a module's hooks. One cannot ask whether there are any without creating a registry."""
FORWARD_BELOW = "_old_forward"
"""Where accelerate keeps the forward that its own hook replaces, and which it puts back."""
PARALLEL_CONFIG = "_parallel_config"
"""On a model and its attention processors: how diffusers has divided the tokens among processes."""
PARALLEL_PLAN = "_cp_plan"
"""On a class of models: how diffusers would divide its tokens."""
CACHE_CONFIG = "_cache_config"
"""On a model: which of diffusers' own caches acts on it."""
CACHE_DIT = "_is_cached"
"""On a model: whether one of cache-dit's caches acts on it."""
PROGRESS_BAR = "_progress_bar_config"
"""On a pipeline: the settings of its progress bar, which can be set but not read publicly."""


def uncompiled(function: Callable[..., Any], why: str) -> Callable[..., Any]:
    """Keep dynamo out of the function's own frame, but not out of those that it calls.

    ``torch.compiler.disable`` would keep it out of these, too. A user reads ``why`` under ``fullgraph=True``.
    """
    function._torchdynamo_disable_msg = why  # type: ignore[attr-defined]
    return skip(function)


def call_of(module: Any) -> Callable[..., Any]:
    """The method that runs a module with its hooks, and not the code that it was compiled to."""
    return module._call_impl


def hook_order(registry: Any) -> list[str]:
    """Names of a module's hooks in diffusers' registry, innermost first: it only removes the last one correctly."""
    return registry._hook_order


def hook_references(registry: Any) -> list[Any]:
    """The objects that link a module's hooks to each other, in the same order."""
    return registry._fn_refs


def mesh_group(parallel_config: Any) -> Any:
    """The processes among which diffusers has divided a model's tokens; ``None`` without a context-parallel config."""
    mesh = getattr(parallel_config, "_flattened_mesh", None)
    return None if mesh is None else mesh.get_group()


def parallel_config(context: Any) -> Any:
    """diffusers' config around a context-parallel one; ``enable_parallelism``, which makes it, needs an accelerator."""
    from diffusers.models._modeling_parallel import ParallelConfig

    return ParallelConfig(context_parallel_config=context)


def find_first_step(scheduler: Any, timestep: Any) -> None:
    """Make a scheduler find the step that it begins with, as it does by itself at its first ``step``."""
    scheduler._init_step_index(timestep)


def set_step(scheduler: Any, index: int) -> None:
    """Set the step of a scheduler. It can be asked for its step, but told only where it begins."""
    scheduler._step_index = index


def condition_of(guider: Any, batch: Any) -> str:
    """Which of a guider's conditions a batch of inputs is for."""
    return str(getattr(batch, guider._identifier_key))


def count_prepared(guider: Any, number: int) -> None:
    """Tells a guider how many conditions of the step have been run: some count, to know which one comes."""
    guider._count_prepared = number


def own_settings(cache_config: Any) -> dict[str, Any]:
    """Keys of vLLM-Omni's cache config that are none of its own: it keeps them for backends it does not know."""
    return dict(getattr(cache_config, "_extra_params", None) or {})


def dit_modules(pipeline: Any) -> tuple[str, ...]:
    """The names under which a pipeline of vLLM-Omni has its denoisers, where they are not the usual ones."""
    return tuple(getattr(pipeline, "_dit_modules", None) or ())


def spread_over(stage: Any) -> int:
    """Over how many processes SGLang's denoising stage spreads a sequence."""
    return int(stage._sp_world_size())


def has_cache_dit(stage: Any) -> bool:
    """Whether SGLang's denoising stage has cache-dit on its models."""
    return bool(getattr(stage, "_cache_dit_enabled", False))
