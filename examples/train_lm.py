"""Train a small language model on Python source code, and compare RMSNorm implementations.

    python examples/train_lm.py --compare
    python examples/train_lm.py --norm fused --dtype bfloat16 --steps 500 --out runs/bf16
    torchrun --nproc-per-node 2 examples/train_lm.py --parallel fsdp

The model (lm_model.py) reads the standard library of the running Python byte by byte, so there is
nothing to download. Three norms can be plugged into it:

    fused      coreai_torch.composite_ops.RMSNorm
    torch      torch.nn.RMSNorm
    reference  coreai_torch.reference.rms_norm, plain PyTorch operations

`--compare` trains with all three side by side, from the same weights and on the same batches. It
ends with a table of speeds and losses, and with exit status 1 if the losses differ by more than
rounding explains.

`--parallel` trains with the processes that torchrun started (lm_parallel.py), to the same losses as
one process alone.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import random
import statistics
import sys
import sysconfig
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from lm_model import NORMS, LanguageModel
from lm_parallel import KINDS, Call, Processes
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from tqdm import tqdm

UNTIMED_STEPS = 3  # the first steps also pay for memory and one-time set-up in libraries
VALIDATION_BATCHES = 8
SHARE_STEPS = 3
BUSY = 1.3  # ratio of median to fastest step above which something else was running
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)  # checkpoints know no processes
FINAL_STEPS = 5  # one batch is a handful of files, and some files are harder than others

# How far a loss may be from the reference's at the first step: 16 units in the last place of a
# float32 between 4 and 8, and one unit in the last place of a bfloat16 between 1 and 2. How that
# grows with the steps is the business of `allowed_difference`.
ROUNDING = {"float32": 2.0**-17, "bfloat16": 2.0**-7}


def option(default: Any, description: str, **more: Any) -> Any:
    """A dataclass field that is a command line option as well."""
    return field(default=default, metadata={"help": f"{description} (%(default)s)", **more})


@dataclass(frozen=True)
class Config:
    """Everything that shapes the losses. A run is resumed under an equal Config only."""

    dim: int = option(256, "width of the model")
    n_layers: int = option(4, "number of transformer blocks")
    n_heads: int = option(4, "attention heads per block")
    seq_len: int = option(256, "bytes per sequence")
    batch_size: int = option(12, "sequences per step")
    steps: int = option(50, "training steps, over which the learning rate decays")
    warmup: int = option(4, "steps over which the learning rate first rises")
    lr: float = option(1e-3, "peak learning rate")
    weight_decay: float = option(0.1, "AdamW weight decay of the matrices")
    clip: float = option(1.0, "gradients are scaled down to this norm")
    dtype: str = option(
        "float32",
        "bfloat16 keeps float32 parameters and computes under autocast",
        choices=tuple(ROUNDING),
    )
    data_mb: float = option(4.0, "megabytes of source code to read")
    seed: int = option(1337, "seed of the initial weights and the batches")


class Batch(NamedTuple):
    """Two (batch_size, seq_len) tensors; targets are the tokens one position later."""

    tokens: Tensor
    targets: Tensor


@dataclass
class Lane:
    """One model in training and its history."""

    norm: str
    model: LanguageModel
    call: Call  # the model, or what stands for it where several processes have it
    processes: Processes
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


# --- data ------------------------------------------------------------------------------------


def read_corpus(megabytes: float) -> tuple[Tensor, Tensor]:
    """Training and validation bytes; every tenth file of the standard library is held out."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    skipped |= {"encodings", "lib2to3", "pydoc_data", "turtledemo"}  # tables and data, not code
    files = sorted(f for f in root.rglob("*.py") if skipped.isdisjoint(f.relative_to(root).parts))
    random.Random(0).shuffle(files)  # the cap is to take from all packages, not from A to L
    train, held_out = bytearray(), bytearray()
    for i, file in enumerate(files):
        if len(train) + len(held_out) >= megabytes * 1e6:
            break
        (held_out if i % 10 == 9 else train).extend(file.read_bytes())
    if not held_out:
        raise SystemExit(f"too little Python source in {root} or too small a --data-mb")
    return torch.frombuffer(train, dtype=torch.uint8), torch.frombuffer(held_out, dtype=torch.uint8)


def draw_batch(data: Tensor, cfg: Config, purpose: str, i: int, device: torch.device) -> Batch:
    """Windows from random places, which follow from (seed, purpose, i) and nothing else.

    So there is no generator whose position a checkpoint would have to keep: the step number says
    which batch comes next.
    """
    rng = random.Random(f"{cfg.seed} {purpose} {i}")
    starts = [rng.randrange(len(data) - cfg.seq_len) for _ in range(cfg.batch_size)]
    windows = torch.stack([data[s : s + cfg.seq_len + 1] for s in starts]).to(device).long()
    return Batch(windows[:, :-1], windows[:, 1:])


# --- training --------------------------------------------------------------------------------


def make_lane(norm: str, cfg: Config, processes: Processes) -> Lane:
    """A fresh model and its optimizer. Equal seeds give equal weights, whichever the norm."""
    torch.manual_seed(cfg.seed)
    model = LanguageModel(
        norm,
        dim=cfg.dim,
        n_layers=cfg.n_layers,
        n_heads=cfg.n_heads,
        seq_len=cfg.seq_len,
        compute_dtype=getattr(torch, cfg.dtype),
    ).to(processes.device)
    call = processes.spread(model)
    groups: list[dict[str, Any]] = [
        {"params": [p for p in model.parameters() if p.ndim == 2]},
        {"params": [p for p in model.parameters() if p.ndim != 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=cfg.lr, betas=(0.9, 0.95), weight_decay=cfg.weight_decay, fused=True
    )
    return Lane(norm, model, call, processes, optimizer)


def learning_rate(step: int, cfg: Config) -> float:
    """A linear rise, then a cosine down to a tenth of the peak."""
    if step < cfg.warmup:
        return cfg.lr * (step + 1) / cfg.warmup
    progress = (step - cfg.warmup) / max(1, cfg.steps - cfg.warmup)
    return cfg.lr * (0.55 + 0.45 * math.cos(math.pi * progress))


def loss_of(lane: Lane, batch: Batch) -> Tensor:
    """Mean cross-entropy in nats per byte, over this process's part of the batch."""
    tokens, targets = map(lane.processes.part, batch)
    return F.cross_entropy(lane.call(tokens).flatten(0, 1), targets.flatten())


def train_step(lane: Lane, batch: Batch, lr: float, clip: float) -> float:
    """One update; returns the loss before it."""
    for group in lane.optimizer.param_groups:
        group["lr"] = lr
    lane.optimizer.zero_grad()
    loss = loss_of(lane, batch)
    loss.backward()
    nn.utils.clip_grad_norm_(lane.model.parameters(), clip)
    lane.optimizer.step()
    # On a GPU this waits for the whole step, so callers can time the call.
    return lane.processes.mean(loss)


def train(lanes: Sequence[Lane], data: Tensor, cfg: Config, args: argparse.Namespace) -> None:
    """Takes all lanes from where they are to the last step.

    Lanes take turns step by step, and the order rotates: a busy neighbour, or a clock that slows
    down with heat, does not hit one of them alone.
    """
    first, last = len(lanes[0].losses), min(cfg.steps, args.stop_at or cfg.steps)
    silent, device = not lanes[0].processes.first, lanes[0].processes.device
    bar = tqdm(range(first, last), initial=first, total=cfg.steps, unit="step", disable=silent)
    for step in bar:
        batch = draw_batch(data, cfg, "train", step, device)
        turn = step % len(lanes)
        for lane in (*lanes[turn:], *lanes[:turn]):
            start = time.perf_counter()
            loss = train_step(lane, batch, learning_rate(step, cfg), cfg.clip)
            lane.seconds.append(time.perf_counter() - start)
            lane.losses.append(loss)
        rate = batch.tokens.numel() / lanes[0].seconds[-1]
        bar.set_postfix_str(f"loss {lanes[0].losses[-1]:.3f}, {rate:,.0f} tokens/s")
        if (step + 1) % args.save_every == 0 or step + 1 == last:
            save_checkpoint(lanes, cfg, args.out)


@torch.no_grad()
def validation_loss(lane: Lane, data: Tensor, cfg: Config) -> float:
    """Mean loss over a few batches of the held-out files, the same ones every time."""
    device, mean = lane.processes.device, lane.processes.mean
    batches = [draw_batch(data, cfg, "validate", i, device) for i in range(VALIDATION_BATCHES)]
    return statistics.fmean(mean(loss_of(lane, batch)) for batch in batches)


def save_checkpoint(lanes: Sequence[Lane], cfg: Config, out: Path) -> None:
    """Writes what a continued run needs, with any number of processes, and the curves so far."""
    states = []
    for lane in lanes:
        model, optimizer = get_state_dict(lane.model, lane.optimizer, options=WHOLE)
        states.append(
            {
                "model": model,
                "optimizer": optimizer,
                "losses": lane.losses,
                "seconds": lane.seconds,
            }
        )
    if not lanes[0].processes.first:
        return
    unfinished = out / "checkpoint.tmp"
    torch.save({"config": asdict(cfg), "lanes": states}, unfinished)
    os.replace(unfinished, out / "checkpoint.pt")  # at once: an interruption spoils neither file
    write_csv(lanes, cfg, out / "loss.csv")


def load_checkpoint(lanes: Sequence[Lane], cfg: Config, out: Path) -> None:
    """Puts the lanes where the checkpoint's were.

    They are matched by position, not by the norm's name: a run may go on with another norm.
    """
    path = out / "checkpoint.pt"
    if not path.exists():
        raise SystemExit(f"there is no {path} to resume from")
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    if checkpoint["config"] != asdict(cfg) or len(checkpoint["lanes"]) != len(lanes):
        raise SystemExit(f"{path} is of a run with other options")
    for lane, state in zip(lanes, checkpoint["lanes"], strict=True):
        set_state_dict(
            lane.model,
            lane.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=WHOLE,
        )
        lane.losses, lane.seconds = state["losses"], state["seconds"]


# --- measurements ----------------------------------------------------------------------------


class Clock:
    """Collects points in time: the host's on a CPU, the stream's on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.marks: list[Any] = []

    def mark(self, *_: object) -> None:
        """Adds a point. It takes any arguments, so that it can serve as any kind of hook."""
        if self.on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def seconds(self) -> float:
        """The time from the first mark to the second, plus third to fourth, and so on."""
        pairs = zip(self.marks[::2], self.marks[1::2], strict=True)
        if self.on_gpu:
            torch.cuda.synchronize()
            return sum(start.elapsed_time(end) for start, end in pairs) / 1e3
        return sum(end - start for start, end in pairs)


def norm_share(lane: Lane, batch: Batch, cfg: Config) -> float:
    """The share of a training step that passes inside its norms, forward and backward.

    Hooks mark the time before and after each norm: of its forward in one step, of its backward in
    another, because what makes backward hooks possible adds work to the forward. Why it is sound:

    * It times the norms of a real step, with caches and memory as the step leaves them, where a
      benchmark of the norm alone would find its input in cache. Both times of a quotient are of
      the same step.
    * A norm's backward is one uninterrupted interval, its weight gradient included. Of the nodes
      that are ready, autograd runs the one created last, and a weight's accumulation before all
      others. The norm's nodes were created in a row, between the nodes of its two backward hooks:
      all later ones are done when it starts, all earlier ones wait until it ends.
    * On a CPU an operation is over when its call returns. On a GPU the marks are events in the
      stream, in order with the kernels, and nothing waits that does not wait in other steps.

    What the hooks add to an interval is a few Python calls, the same ones for every norm.
    """
    share = 0.0
    for before_and_after in (
        (nn.Module.register_forward_pre_hook, nn.Module.register_forward_hook),
        (nn.Module.register_full_backward_pre_hook, nn.Module.register_full_backward_hook),
    ):
        step, inside = Clock(batch.tokens.device), Clock(batch.tokens.device)
        hooks = [
            register(norm, inside.mark)
            for norm in lane.model.norms()
            for register in before_and_after
        ]
        step.mark()
        train_step(lane, batch, learning_rate(cfg.steps, cfg), cfg.clip)
        step.mark()
        for hook in hooks:
            hook.remove()
        share += inside.seconds() / step.seconds()
    return share


def norm_shares(lanes: Sequence[Lane], data: Tensor, cfg: Config) -> list[float]:
    """Each lane's `norm_share`, the median of several. They come after all that is saved."""
    device = lanes[0].processes.device
    batches = [draw_batch(data, cfg, "share", i, device) for i in range(SHARE_STEPS)]
    shares = [[norm_share(lane, batch, cfg) for lane in lanes] for batch in batches]
    return [statistics.median(column) for column in zip(*shares, strict=True)]


def timed_steps(lane: Lane) -> list[float]:
    """Seconds of the steps whose speed counts."""
    return lane.seconds[UNTIMED_STEPS:] or lane.seconds


def slowdown(lanes: Sequence[Lane]) -> float:
    """How much longer the median step took than the fastest one, which had the machine alone."""
    seconds = [timed_steps(lane) for lane in lanes]
    return max(statistics.median(s) / min(s) for s in seconds)


def allowed_difference(step: int, cfg: Config) -> float:
    """How far two losses may be apart after `step` updates if only their rounding differs.

    Every step adds rounding of its own: the linear factor. Training amplifies what is there, two
    runs that differ in one bit separate exponentially: the factor that doubles every 100 steps.
    The constants come from an experiment that involves one norm only: the reference against
    itself, with all initial weights changed by one unit in the last place. In float32, over 50 to
    400 steps, the losses stayed below a sixth of this bound at the default learning rate (three
    seeds), and within it at twice that (four seeds), where single steps turn out unstable.
    A wrong norm shows early, while the bound is tight: a gradient whose second term is off by 1 %
    exceeds it several times over after one update.
    """
    return ROUNDING[cfg.dtype] * (1 + step) * 2 ** (step / 100)


def differences(lane: Lane, reference: Lane) -> list[float]:
    """|loss - reference loss| at each step."""
    return [abs(a - b) for a, b in zip(lane.losses, reference.losses, strict=True)]


def disagreement(lane: Lane, reference: Lane, cfg: Config) -> str | None:
    """The first step at which rounding does not explain the difference, in words."""
    for step, difference in enumerate(differences(lane, reference)):
        allowed = allowed_difference(step, cfg)
        if not difference <= allowed:  # also true of NaN
            return (
                f"{lane.norm}: the loss of step {step} is {difference:.1e} from the reference's, "
                f"rounding explains {allowed:.1e}"
            )
    return None


# --- output ----------------------------------------------------------------------------------


def write_csv(lanes: Sequence[Lane], cfg: Config, path: Path) -> None:
    """Columns step, loss, lr, seconds; with several lanes a loss and seconds column for each."""
    suffixes = [f"_{lane.norm}" for lane in lanes] if len(lanes) > 1 else [""]
    losses, seconds = ([f"{name}{s}" for s in suffixes] for name in ("loss", "seconds"))
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", *losses, "lr", *seconds])
        for step in range(len(lanes[0].losses)):
            writer.writerow(
                [
                    step,
                    *(lane.losses[step] for lane in lanes),
                    learning_rate(step, cfg),
                    *(lane.seconds[step] for lane in lanes),
                ]
            )


def draw_curves(lanes: Sequence[Lane], cfg: Config, path: Path) -> None:
    """The loss curves and, with several lanes, their distances from the reference."""
    comparing = len(lanes) > 1
    figure = Figure(figsize=(8, 7 if comparing else 4), layout="constrained")
    axes = figure.subplots(2 if comparing else 1, sharex=True, squeeze=False)[:, 0]
    for i, lane in enumerate(lanes):
        width = 2.0 * (len(lanes) - i)  # curves that lie on each other stay visible
        axes[0].plot(lane.losses, label=lane.norm, linewidth=width)
    axes[0].set(ylabel="training loss (nats per byte)", title=f"dim {cfg.dim}, {cfg.dtype}")
    axes[0].legend()
    if comparing:
        for lane in lanes[:-1]:
            axes[1].plot(differences(lane, lanes[-1]), ".", label=lane.norm)
        bound = [allowed_difference(step, cfg) for step in range(len(lanes[0].losses))]
        axes[1].plot(bound, "k--", label="rounding explains up to")
        axes[1].set(ylabel="distance from reference (0 not shown)", yscale="log")
        axes[1].legend()
    axes[-1].set_xlabel("step")
    figure.savefig(path, dpi=120)


def format_table(columns: dict[str, list[str]]) -> str:
    """Aligned text: the first column to the left, the others to the right."""
    widths = [max(map(len, (head, *cells))) for head, cells in columns.items()]
    rows = [tuple(columns), tuple("-" * w for w in widths), *zip(*columns.values(), strict=True)]
    return "\n".join(
        "  ".join(
            c.rjust(w) if i else c.ljust(w)
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def report(lanes: Sequence[Lane], validation: list[float], shares: list[float], cfg: Config) -> str:
    """The table of results. Speeds are those of the median step."""
    seconds = [timed_steps(lane) for lane in lanes]
    tokens = cfg.batch_size * cfg.seq_len
    columns = {
        "norm": [lane.norm for lane in lanes],
        "tokens/s": [f"{tokens / statistics.median(s):,.0f}" for s in seconds],
    }
    if len(lanes) > 1:
        # Steps of the same number ran right after one another, so the median of their quotients
        # is steadier than the quotient of two medians.
        baseline = seconds[[lane.norm for lane in lanes].index("torch")]
        quotients = [[b / t for b, t in zip(baseline, s, strict=True)] for s in seconds]
        columns["vs nn.RMSNorm"] = [f"{statistics.median(q):.3f} x" for q in quotients]
    columns["share of step in norms"] = [f"{share:.1%}" for share in shares]
    final = [statistics.fmean(lane.losses[-FINAL_STEPS:]) for lane in lanes]
    columns["final loss"] = [f"{loss:.4f}" for loss in final]
    columns["validation"] = [f"{loss:.4f}" for loss in validation]
    if len(lanes) > 1:
        largest = [max(differences(lane, lanes[-1])) for lane in lanes[:-1]]
        columns["largest difference"] = [*(f"{d:.1e}" for d in largest), "-"]
    return format_table(columns)


def verdict(lanes: Sequence[Lane], cfg: Config) -> bool:
    """Says whether all lanes agree with the last one, the reference."""
    found = [disagreement(lane, lanes[-1], cfg) for lane in lanes[:-1]]
    problems = [problem for problem in found if problem]
    if problems:
        print("The losses do not agree.", *problems, sep="\n")
    else:
        steps = len(lanes[0].losses)
        print(f"The losses agree within {cfg.dtype} rounding at each of {steps} steps.")
    return not problems


# --- command line ----------------------------------------------------------------------------


def parse_arguments() -> tuple[argparse.Namespace, Config]:
    """The options of this run, and those that shape its losses."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--norm", choices=tuple(NORMS), default="fused", help="norm to train with")
    what.add_argument("--compare", action="store_true", help="train with all norms, side by side")
    parser.add_argument(
        "--device",
        type=torch.device,
        default=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        help="cpu or cuda (%(default)s)",
    )
    parser.add_argument(
        "--parallel", choices=KINDS, help="train with the processes that torchrun started"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/lm"), help="folder for the results (%(default)s)"
    )
    parser.add_argument(
        "--save-every", type=int, default=25, help="steps between checkpoints (%(default)s)"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument(
        "--stop-at", type=int, metavar="STEP", help="stop early, for --resume to go on later"
    )
    for f in fields(Config):
        name = "--" + f.name.replace("_", "-")
        parser.add_argument(name, type=type(f.default), default=f.default, **f.metadata)
    args = parser.parse_args()
    if args.dim % (2 * args.n_heads):
        parser.error("--dim has to be a multiple of twice --n-heads: RoPE turns pairs of channels")
    return args, Config(**{f.name: getattr(args, f.name) for f in fields(Config)})


def main() -> int:
    """Trains, measures, reports; the exit status is 1 if losses that should agree do not."""
    args, cfg = parse_arguments()
    processes = Processes(args.parallel, args.device)
    processes.check(cfg.batch_size, cfg.n_heads, cfg.seq_len)
    args.out.mkdir(parents=True, exist_ok=True)
    data, held_out = read_corpus(cfg.data_mb)
    norms = tuple(NORMS) if args.compare else (args.norm,)
    lanes = [make_lane(norm, cfg, processes) for norm in norms]
    if args.resume:
        load_checkpoint(lanes, cfg, args.out)

    train(lanes, data, cfg, args)
    validation = [validation_loss(lane, held_out, cfg) for lane in lanes]
    shares = norm_shares(lanes, data, cfg)
    if not processes.first:
        return processes.finish(0)
    draw_curves(lanes, cfg, args.out / "loss.png")
    print(report(lanes, validation, shares, cfg))
    if slowdown(lanes) > BUSY:
        print(f"Speeds are unreliable: the median step took {slowdown(lanes):.1f} x the fastest.")
    print(f"Curves and checkpoint are in {args.out}.")
    return processes.finish(0 if len(lanes) == 1 or verdict(lanes, cfg) else 1)


if __name__ == "__main__":
    sys.exit(main())
