"""vLLM-Omni: the cache backend ``unicp``.

vLLM-Omni finds :func:`register` by the entry-point group ``vllm_omni.general_plugins``, in every process. Then
``cache_backend="unicp"`` is answered, with ``cache_config={"target_speedup": 2}``, or a config with its ``method``.
``UNICP_PROFILES`` names a folder of profiles.
"""

from __future__ import annotations

import functools
import importlib
import logging
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..errors import UnicpError
from . import folder
from .settings import config_of

if TYPE_CHECKING:  # found in every process, also in those that run no model
    from .diffusers.session import Session

NAME = "unicp"
SELECTOR = "vllm_omni.diffusion.cache.selector"
RUNNER = "vllm_omni.diffusion.worker.diffusion_model_runner"
"""It imports the function by name: where that has happened, it is wrapped there, too."""

log = logging.getLogger(__name__)


def register() -> None:
    """Called by vLLM-Omni, maybe several times."""
    selector = importlib.import_module(SELECTOR)
    for module in (selector, sys.modules.get(RUNNER)):
        found = getattr(module, "get_cache_backend", None)
        if found is not None and not getattr(found, "answers_unicp", False):
            module.get_cache_backend = answering(found)  # type: ignore[union-attr]


def answering(get_cache_backend: Callable[..., Any]) -> Callable[..., Any]:
    """vLLM-Omni's choice of a cache backend, which also knows this one."""

    @functools.wraps(get_cache_backend)
    def choose(cache_backend: str | None, cache_config: Any) -> Any:
        return UnicpBackend(cache_config) if cache_backend == NAME else get_cache_backend(cache_backend, cache_config)

    choose.answers_unicp = True  # type: ignore[attr-defined]
    return choose


class UnicpBackend:
    """Has the interface of vLLM-Omni's ``CacheBackend``: what is put on the model stays there, one run a request.

    Args:
        config: their cache config, or the mapping it is made of. Keys that are none of theirs are ours.

    Raises:
        UnicpError: these are no config that can be played here.
    """

    def __init__(self, config: Any) -> None:
        from ..tensors import private

        self.config, self.enabled = config, False
        self._given = dict(config) if isinstance(config, dict) else private.own_settings(config)
        found = config_of(self._given)
        assert found is not None
        self._acting, self._seen = found, 0
        self.session: Session | None = None

    def enable(self, pipeline: Any) -> None:
        """Put it on the transformers of a pipeline.

        Raises:
            UnicpError: the pipeline has none, is spread over processes that would decide apart, or what was asked for
                needs a profile and there is none. That a profile is of this model and of the scheduler, which requests
                may choose, is checked as each video begins.
        """
        import torch

        from ..engine.solver.leap import leaps
        from ..tensors import private
        from .diffusers.compiled import original
        from .diffusers.components import DENOISERS
        from .diffusers.session import Session

        names = private.dit_modules(pipeline) or DENOISERS
        modules = {name: getattr(pipeline, name, None) for name in names}
        found = {name: original(module) for name, module in modules.items() if isinstance(module, torch.nn.Module)}
        if not found:
            raise UnicpError(f"{type(pipeline).__name__} has no transformer under the names {', '.join(names)}")
        parallel = getattr(getattr(pipeline, "od_config", None), "parallel_config", None)
        for name in ("sequence_parallel_size", "cfg_parallel_size", "pipeline_parallel_size"):
            if (getattr(parallel, name, None) or 1) > 1:
                raise UnicpError(
                    f"cache_backend='unicp' does not go together with {name}={getattr(parallel, name)}: processes "
                    f"would decide apart; set {name}=1"
                )
        model = str(getattr(getattr(pipeline, "od_config", None), "model", None) or "")
        acting: Any = config_of(self._given, model)

        def plans() -> Any:
            scheduler = getattr(pipeline, "scheduler", None)
            return folder.plans(acting, scheduler, model, leaps=len(found) == 1 and leaps(scheduler))

        if self.session is not None:
            self.session.restore()
        self._acting = acting
        asks = plans if getattr(acting, "profile", None) is not None else None
        self.session = Session(found, acting, acting, dict.fromkeys(found), pipeline, None, asks)
        self.enabled, self._seen = True, 0

    def refresh(self, pipeline: Any, num_inference_steps: int, verbose: bool = True) -> None:
        """A request begins: what is left of the one before is dropped, and its report logged."""
        if self.session is None:
            return
        self.session.end()
        reports = self.session.reports
        if verbose and reports and self.session.made > self._seen:
            log.info("%s", reports[-1])
        self._seen = self.session.made

    def is_enabled(self) -> bool:
        return self.enabled

    def report(self) -> Any:
        """What was done for the last request; see :meth:`unicp.Session.report`."""
        if self.session is None:
            raise UnicpError("there is no report yet: the backend acts on no pipeline")
        return self.session.report()
