"""cache-dit: DBCache, alone and with its TaylorSeer. Needs ``pip install 'unicp[peers]'``."""

from __future__ import annotations

import logging
from typing import Any, ClassVar

from ..errors import missing_extra
from ..tensors.private import CACHE_DIT
from .peers import Call, Peer, Run, register


def _library() -> Any:
    try:
        import cache_dit
    except ImportError as error:
        raise missing_extra("cache-dit", "peers", "its caches") from error
    for name in list(logging.root.manager.loggerDict):
        if name.partition(".")[0] == "cache_dit":  # each of its modules has a verbose logger of its own
            logging.getLogger(name).setLevel(logging.ERROR)
    return cache_dit


@register
class DBCache(Peer):
    """Skips the blocks between the first ones and the last while the first ones' residual changes little."""

    name = "cache-dit-dbcache"
    source = "cache-dit"
    library = "cache-dit"
    knob = "threshold"
    grid = (0.05, 0.1, 0.2, 0.3)
    note = "Its defaults (8 warm-up steps), but one leading block instead of 8, so that models of few blocks gain too."
    taylor: ClassVar[bool] = False

    def apply(self, run: Run, label: str) -> Call:
        library = _library()
        calibrator = library.TaylorSeerCalibratorConfig(taylorseer_order=1) if self.taylor else None
        library.enable_cache(
            run.pipe,
            cache_config=library.DBCacheConfig(
                Fn_compute_blocks=1, Bn_compute_blocks=0, residual_diff_threshold=self.value(label)
            ),
            calibrator_config=calibrator,
        )
        return run.call

    def remove(self, run: Run) -> None:
        if getattr(type(run.pipe), CACHE_DIT, False):
            _library().disable_cache(run.pipe)


@register
class DBCacheTaylorSeer(DBCache):
    """DBCache with the skipped residual extrapolated."""

    name = "cache-dit-taylorseer"
    taylor = True
