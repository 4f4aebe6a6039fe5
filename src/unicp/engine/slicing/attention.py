"""PCAS, PCA based slicing: attention in the leading principal directions of each head (UniCP, arXiv 2502.04393).

The paper says that PCA slices query and key at the steps that cannot be cached; everything beyond that sentence is our
reconstruction. Per head, from second moments that calibration measured on queries, keys and values as they enter the
dot product: ``P_qk`` (d, r), the leading eigenvectors of ``E[q q^T] + E[k k^T]``, and ``P_v`` (d, r) of ``E[v v^T]``.

    q' = q P_qk    k' = k P_qk    v' = v P_v    o = softmax(q' k'^T / sqrt(d)) v' P_v^T

The scale stays that of the full head size d. Attention runs on the same kernels as before, at head size r.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ...tensors.private import HOOK_REGISTRY
from .instrumented import instrumented


def second_moments(tensor: Any, heads_first: bool) -> Any:
    """``sum x x^T`` over batch and tokens, for each head: (H, d, d) in float32."""
    x = tensor.float() if heads_first else tensor.float().transpose(1, 2)  # (B, H, T, d)
    return torch.einsum("bhti,bhtj->hij", x, x)


def basis(moment: Any, rank: int) -> Any:
    """The ``rank`` leading eigenvectors of each head's moment (H, d, d): (H, d, rank), in float32.

    >>> basis(torch.diag(torch.tensor([1.0, 4.0]))[None], 1).abs()[0, :, 0].tolist()
    [0.0, 1.0]
    """
    vectors = torch.linalg.eigh(moment.double())[1]  # ascending
    return vectors.flip(-1)[..., :rank].float().contiguous()


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """Head sizes of a sliced attention: of queries and keys, and of values."""

    qk: int
    v: int


def rank_grid(head_size: int) -> tuple[int, ...]:
    """Ranks worth trying: multiples of 16 up to the head size; of 8 for head sizes up to 64, of 4 for those up to 16.

    >>> rank_grid(64)
    (8, 16, 24, 32, 40, 48, 56, 64)
    """
    step = 16 if head_size > 64 else 8 if head_size > 16 else 4
    return tuple(range(step, head_size, step)) + (head_size,)


MAX_RANK_SHARE = 0.75
"""A module that needs more than this share of its head size is left unsliced."""


def choose_ranks(errors: Mapping[int, tuple[float, float, float]], head_size: int, limit: float) -> Ranks | None:
    """The smallest head size whose measured slicing error is within the limit.

    Queries, keys and values are padded to one head size, as the fused kernels require, so unequal ranks would save
    nothing: one rank serves both.

    Args:
        errors: by rank, the relative change of the module's output when queries, keys and values, only queries and
            keys, or only values are sliced.
        head_size: full head size d.
        limit: largest admissible error; 0 slices nothing.

    >>> choose_ranks({16: (0.3, 0.1, 0.28), 32: (0.04, 0.01, 0.04), 64: (0.0, 0.0, 0.0)}, 64, 0.05)
    Ranks(qk=32, v=32)
    """
    if limit <= 0:
        return None
    for rank in sorted(errors):
        if rank <= MAX_RANK_SHARE * head_size and errors[rank][0] <= limit:
            return Ranks(qk=rank, v=rank)
    return None


class _Projected:
    """An attention module as its processor sees it, with values and output projection folded into the basis."""

    def __init__(self, attn: Any, folded: Folded) -> None:
        self._attn = attn
        self.to_v = folded.to_v
        self.to_out = [folded.to_out, *list(attn.to_out)[1:]]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._attn, name)


class Folded:
    """The folded weights ``W_v P_v`` and ``P_v^T W_o``, and a record of the weights they were made from."""

    def __init__(self, attn: Any, p_v: Any) -> None:
        self.made_from = self.state(attn)
        value, out = attn.to_v, attn.to_out[0]
        heads, size, rank = p_v.shape
        p = p_v.to(value.weight.device, torch.float32)
        weight = value.weight.detach().float().view(heads, size, -1)
        w_v = torch.einsum("hdr,hdc->hrc", p, weight).reshape(heads * rank, -1)
        b_v = None
        if value.bias is not None:
            b_v = torch.einsum("hdr,hd->hr", p, value.bias.detach().float().view(heads, size)).reshape(-1)
        w_o = torch.einsum("chd,hdr->chr", out.weight.detach().float().view(-1, heads, size), p).flatten(1)
        dtype = value.weight.dtype
        self.value_weight, self.out_weight = w_v.to(dtype), w_o.to(dtype)
        self.value_bias = b_v.to(dtype) if b_v is not None else None
        self._out = out

    @staticmethod
    def state(attn: Any) -> tuple[Any, ...] | None:
        """Identity and version of the weights that a fold depends on; ``None`` where nothing may be folded."""
        out = attn.to_out[0] if isinstance(getattr(attn, "to_out", None), list | torch.nn.ModuleList) else None
        value = getattr(attn, "to_v", None)
        # Exactly this class: a LoRA layer, a quantised one or one with an offloading hook is more than its weight.
        if type(value) is not torch.nn.Linear or type(out) is not torch.nn.Linear:
            return None
        if any(type(m.weight) not in (torch.nn.Parameter, torch.Tensor) for m in (value, out)):
            return None  # torchao keeps the layer, and quantises the tensor
        if getattr(attn, "fused_projections", False) or any(hasattr(m, HOOK_REGISTRY) for m in (value, out)):
            return None
        if any(hasattr(m, "_hf_hook") or not m.weight.is_floating_point() for m in (value, out)):
            return None
        weights = [value.weight, out.weight] + [b for b in (value.bias, out.bias) if b is not None]
        if any(w.is_meta or w.is_inference() for w in weights):
            return None
        return tuple((w.data_ptr(), w._version, w.dtype, w.device) for w in weights)

    def to_v(self, hidden: Any) -> Any:
        return F.linear(hidden, self.value_weight, self.value_bias)

    def to_out(self, hidden: Any) -> Any:
        return F.linear(hidden, self.out_weight, self._out.bias)

    @property
    def tensors(self) -> list[Any]:
        return [w for w in (self.value_weight, self.value_bias, self.out_weight) if w is not None]


class _ValuesReshaped(Exception):
    """A processor took folded values for ones of the full head size."""


class SlicedAttention:
    """The sliced twin of one attention module.

    Args:
        attn: the module; its processor is read at every call, so that one set later is sliced as well.
        p_qk, p_v: bases (H, d, r) of queries and keys, and of values; ``None`` leaves them as they are.
        fold: the spec says that the processors use plain values (``BlockList.plain_values``).
    """

    def __init__(self, attn: Any, p_qk: Any, p_v: Any, fold: bool = False) -> None:
        self.attn = attn
        self.p_qk, self.p_v = p_qk, p_v
        self._may_fold = fold and p_v is not None
        self._folded: Folded | None = None
        self._twin: tuple[Any, Any] = (None, None)
        self._cast: dict[tuple[Any, ...], Any] = {}

    @property
    def works(self) -> bool:
        """Whether the module's processor is one that can be sliced."""
        return self._processor() is not None

    def __call__(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the module's forward with sliced attention."""
        self.refold()
        own = self.attn.processor
        twin = self._processor()
        if twin is None:
            return forward(*args, **kwargs)
        self.attn.processor = twin
        try:
            return forward(*args, **kwargs)
        except _ValuesReshaped:
            # Its processor does not infer the head size from the values: from now on they are projected online.
            self._may_fold, self._folded = False, None
            return forward(*args, **kwargs)
        finally:
            self.attn.processor = own

    def _processor(self) -> Any:
        own = self.attn.processor
        if self._twin[0] is not own:
            self._twin = (own, instrumented(own, self._attend, self._view))
        return self._twin[1]

    def renew(self) -> None:
        """Fold again at the next call, even if the weights seem unchanged.

        Adapters are fused through ``weight.data``, which changes neither a weight's address nor its version.
        """
        self._folded = None

    @property
    def stale(self) -> bool:
        """Whether weights have to be folded before the next call: for the first time, or because they changed."""
        state = Folded.state(self.attn) if self._may_fold else None
        return state is not None and (self._folded is None or self._folded.made_from != state)

    def refold(self) -> None:
        """Fold again if weights changed: a state dict was loaded, an adapter put on, or the model moved."""
        if not self._may_fold:
            return
        if self.stale:
            self._folded = Folded(self.attn, self.p_v)
        elif Folded.state(self.attn) is None:
            self._folded = None

    def _view(self, attn: Any) -> Any:
        return attn if self._folded is None else _Projected(attn, self._folded)

    def _like(self, name: str, p: Any, tensor: Any) -> Any:
        key = (name, tensor.dtype, tensor.device)
        if key not in self._cast:
            self._cast[key] = p.to(tensor.device, tensor.dtype)
        return self._cast[key]

    def _attend(
        self, attend: Any, heads_first: bool, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if kwargs.get("scale") is None:
            kwargs["scale"] = 1.0 / math.sqrt(query.shape[-1])
        if self._folded is not None and value.shape[-1] != self.p_v.shape[-1]:
            raise _ValuesReshaped
        into = "bhti,hij->bhtj" if heads_first else "bthi,hij->bthj"
        back = "bhtj,hij->bhti" if heads_first else "bthj,hij->bthi"
        if self.p_qk is not None:
            p = self._like("qk", self.p_qk, query)
            query, key = torch.einsum(into, query, p), torch.einsum(into, key, p)
        sliced_here = self.p_v is not None and self._folded is None
        if sliced_here:
            value = torch.einsum(into, value, self._like("v", self.p_v, value))
        width = value.shape[-1]
        size = max(query.shape[-1], width)
        # Fused kernels take one head size. Zeros change neither the products nor, as they are cut off, the output.
        query, key, value = (
            F.pad(t, (0, size - t.shape[-1])) if t.shape[-1] < size else t for t in (query, key, value)
        )
        out = attend(query, key, value, *args, **kwargs)[..., :width]
        return torch.einsum(back, out, self._like("v", self.p_v, out)) if sliced_here else out

    def tensors(self) -> list[Any]:
        """Everything it holds besides the module: bases and folded weights."""
        held = [*self._cast.values(), *(p for p in (self.p_qk, self.p_v) if p is not None)]
        return held + (self._folded.tensors if self._folded is not None else [])
