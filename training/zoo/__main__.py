"""Train one member of the proving ground on the latents that ``training.zoo.data`` encodes.

    python -m training.zoo cogvideox --steps 2500      # resumes from $UNICP_ZOO_RUNS/cogvideox.pt

The learning rate warms up, stays, and falls linearly to zero over the last ``--decay`` steps. A run may be stopped at
any time and resumed with another ``--steps``: only the fall depends on it.
"""

from __future__ import annotations

import argparse
import signal
import time
from typing import Any

import torch
import torch.nn.functional as F

from training.models import save_atomically
from training.zoo.data import KINDS, RUNS, Data
from training.zoo.member import Member, Modules
from training.zoo.members import NAMES, member

WARM_UP = 150
LOG_EVERY, REFRESH_EVERY = 25, 100


def attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Stands in for PyTorch's attention in training: for a few hundred tokens on a CPU it is faster, backward too."""
    assert not (dropout_p or is_causal or enable_gqa)
    query = query * (query.shape[-1] ** -0.5 if scale is None else scale)
    logits = query @ key.transpose(-1, -2)
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=logits.dtype).masked_fill(~attn_mask, -1e9)
        logits = logits + attn_mask
    return logits.softmax(-1).to(value.dtype) @ value


def optimizers(chosen: Member, modules: Modules, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for everything else."""
    matrices = [
        parameter
        for module in modules.values()
        for name in chosen.blocks
        for parameter in getattr(module, name).parameters()
        if parameter.ndim == 2
    ]
    inside = {id(parameter) for parameter in matrices}
    rest = [p for module in modules.values() for p in module.parameters() if id(p) not in inside]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.01, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.01),
    ]


class Run:
    """The state of a training run: what a checkpoint holds."""

    def __init__(self, chosen: Member, lr: float, seed: int) -> None:
        torch.manual_seed(seed)
        self.path = RUNS / f"{chosen.name}.pt"
        self.modules = chosen.shortened(chosen.modules())
        self.average = {
            name: {key: p.detach().clone() for key, p in module.named_parameters()}
            for name, module in self.modules.items()
        }
        self.optimizers = optimizers(chosen, self.modules, lr)
        self.step, self.seconds = 0, 0.0
        self.curve: list[tuple[int, float]] = []

    def resume(self) -> None:
        state = torch.load(self.path)
        for name, module in self.modules.items():
            module.load_state_dict(state["modules"][name])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.average, self.step, self.seconds = state["average"], state["step"], state["seconds"]
        self.curve = state["curve"]

    def save(self, settings: dict[str, Any]) -> None:
        state = {
            "modules": {name: module.state_dict() for name, module in self.modules.items()},
            "average": self.average,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "seconds": self.seconds,
            "curve": self.curve,
            "settings": settings,
        }
        save_atomically(state, self.path)

    def parameters(self) -> list[torch.nn.Parameter]:
        return [p for module in self.modules.values() for p in module.parameters()]

    @torch.no_grad()
    def update(self, lr: float, longest_average: float) -> None:
        """Take one step down the gradients there are, and the average along."""
        torch.nn.utils.clip_grad_norm_(self.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        decay = min(longest_average, (self.step + 1) / (self.step + 10))
        for name, module in self.modules.items():
            for key, parameter in module.named_parameters():
                self.average[name][key].lerp_(parameter, 1 - decay)
        self.step += 1


def train(run: Run, chosen: Member, sets: list[Data], args: argparse.Namespace) -> None:
    """Train until ``args.steps``, or until the process is told to end; either way the last step is in a checkpoint."""
    stopped: list[int] = []
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda number, _frame: stopped.append(number))
    F.scaled_dot_product_attention = attention
    generator = torch.Generator().manual_seed(args.seed * 1_000_003 + run.step)
    first = logged = run.step
    smooth, saved, counted = 0.0, time.time(), time.time()
    for step in range(run.step, args.steps):
        if step % REFRESH_EVERY == 0:
            for data in sets:
                data.refresh()
        data = sets[step % len(sets)]
        batch = data.batch(args.batch // data.kind.cost, args.caption_dropout, generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=not args.float32):
            loss = chosen.loss(run.modules, batch)
        loss.backward()
        run.update(args.lr * min(1.0, (step + 1) / WARM_UP, (args.steps - step) / args.decay), args.ema)
        smooth += (loss.item() - smooth) / min(run.step - first, 100)
        last = run.step == args.steps or stopped
        if run.step % LOG_EVERY == 0 or last:
            now = time.time()
            run.seconds += now - counted
            run.curve.append((run.step, round(smooth, 5)))
            rate = (run.step - logged) * args.batch / (now - counted)
            logged, counted = run.step, now
            print(f"step {run.step}: loss {smooth:.4f}, {rate:.1f} samples/s, {sum(map(len, sets))} videos", flush=True)
        if last or time.time() - saved > 60 * args.save_every:
            run.save(vars(args) | {"videos": sum(map(len, sets))})
            saved = time.time()
        if last:
            break


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("member", choices=NAMES)
    parser.add_argument("--steps", type=int, help="by default what the member says")
    parser.add_argument("--decay", type=int, help="by default a quarter of the steps")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, help="by default what the member says")
    parser.add_argument("--caption-dropout", type=float, default=0.1)
    parser.add_argument("--ema", type=float, default=0.998)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=float, default=3, help="minutes between checkpoints")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--float32", action="store_true", help="no bfloat16 autocast")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    chosen = member(args.member)
    args.steps = args.steps or chosen.steps
    args.decay = args.decay or max(1, args.steps // 4)
    args.lr = args.lr or chosen.lr
    run = Run(chosen, args.lr, args.seed)
    if run.path.exists():
        run.resume()
    sets = [Data(KINDS[kind]) for kind in chosen.data]
    if not all(map(len, sets)):
        raise SystemExit(f"{RUNS} lacks latents: python -m training.zoo.data {chosen.name} encodes them")
    count = sum(p.numel() for p in run.parameters()) / 1e6
    print(f"{chosen.name}: {count:.2f} M parameters, from step {run.step} to {args.steps}", flush=True)
    train(run, chosen, sets, args)


if __name__ == "__main__":
    main()
