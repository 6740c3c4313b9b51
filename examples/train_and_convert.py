"""Train a small language model, convert it to Core AI, run it there, and compare with PyTorch.

    python examples/train_and_convert.py
    python examples/train_and_convert.py --checkpoint runs/demo/checkpoint.pt

The model is that of train_lm.py. Without a checkpoint of train_lm.py it is trained here, for a few
steps, on the fused kernels. Converted, each of its norms is a call of the composite op `rms_norm`.
On held-out text the example compares the logits of Core AI's runtime with those of PyTorch, the
loss, and what the model writes. The exit status is 1 if they differ by more than rounding explains.

It takes Apple's converter and runtime: pip install coreai-torch, or `make converter`.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from lm_model import LanguageModel
from lm_parallel import Processes
from torch import Tensor
from tqdm import tqdm
from train_lm import Config, draw_batch, learning_rate, make_lane, read_corpus, train_step

import coreai_torch
from coreai_torch.conversion import INSTALL, composites, convert, load

CPU = torch.device("cpu")
WINDOWS = 8  # of held-out text, on which logits and losses are compared
PROMPT = 64  # bytes of a window that the models go on from
CONTINUATION = 48  # bytes

# Relative to the largest logit. The two differ in the order of their sums and in how they compute
# exponentials: 6 units were measured after 20 steps of training. A norm without its scale, or with
# another eps, is off by more than a thousand.
LOGITS_TOLERANCE = 64 * torch.finfo(torch.float32).eps

Logits = Callable[[Tensor], Tensor]  # (1, seq_len) tokens to (1, seq_len, 256) logits


def trained(args: argparse.Namespace) -> tuple[LanguageModel, Config]:
    """The model of a checkpoint, or one that is trained here; on the CPU, in float32."""
    if args.checkpoint:
        checkpoint = torch.load(args.checkpoint, map_location=CPU, weights_only=True)
        cfg = Config(**checkpoint["config"] | {"dtype": "float32"})
        lane = make_lane("fused", cfg, Processes(None, CPU))
        lane.model.load_state_dict(checkpoint["lanes"][0]["model"])
        return lane.model, cfg
    cfg = Config(steps=args.steps)
    data, _ = read_corpus(cfg.data_mb)
    lane = make_lane("fused", cfg, Processes(None, CPU))
    bar = tqdm(range(cfg.steps), desc="training", unit="step")
    for step in bar:
        batch = draw_batch(data, cfg, "train", step, CPU)
        loss = train_step(lane, batch, learning_rate(step, cfg), cfg.clip)
        bar.set_postfix_str(f"loss {loss:.3f}")
    return lane.model, cfg


def show_composites(program: object) -> bool:
    """Prints the composite declarations and their calls; says whether the norms are among them."""
    from coreai_torch.debugging.histogram import operation_histogram

    calls = {c.symbol: c.invocations for c in operation_histogram(program).composites}
    declarations = composites(program)
    print("\nComposite ops (the converter merges equal graphs: scales are inputs):")
    for graph, declaration in declarations.items():
        print(f"  {calls[graph]} calls of {graph}\n    {declaration}")
    return any('"rms_norm"' in declaration for declaration in declarations.values())


def losses(logits: Logits, windows: Tensor) -> tuple[Tensor, Tensor]:
    """All logits, and the mean cross-entropy in nats per byte, window by window."""
    outputs = torch.cat([logits(window[None, :-1]) for window in windows])
    return outputs, F.cross_entropy(outputs.flatten(0, 1), windows[:, 1:].flatten())


def go_on(logits: Logits, prompt: Tensor, seq_len: int) -> Tensor:
    """What the model writes: the likeliest byte, again and again.

    The program takes seq_len bytes. What follows a position does not change its logits, so the
    rest may be anything.
    """
    text = torch.zeros(1, seq_len, dtype=torch.long)
    text[0, : len(prompt)] = prompt
    for end in range(len(prompt), len(prompt) + CONTINUATION):
        text[0, end] = logits(text)[0, end - 1].argmax()
    return text[0, len(prompt) : len(prompt) + CONTINUATION]


def first_difference(a: Tensor, b: Tensor) -> int | None:
    """The first position at which two texts differ."""
    different = (a != b).nonzero()
    return int(different[0]) if len(different) else None


def shown(text: Tensor) -> str:
    return repr(bytes(text.tolist()).decode(errors="replace"))


def compare(eager: Logits, runtime: Logits, cfg: Config) -> list[str]:
    """Prints both models' results; returns what rounding does not explain."""
    _, held_out = read_corpus(cfg.data_mb)
    rows = draw_batch(held_out, cfg, "convert", 0, CPU)
    windows = torch.cat([rows.tokens, rows.targets[:, -1:]], dim=1)[:WINDOWS]
    (ours, our_loss), (theirs, their_loss) = losses(eager, windows), losses(runtime, windows)
    largest = ours.abs().max().item()
    difference = (ours - theirs).abs().max().item()
    allowed = LOGITS_TOLERANCE * largest
    prompt = windows[0, :PROMPT]
    texts = [go_on(logits, prompt, cfg.seq_len) for logits in (eager, runtime)]

    print(f"\nOn {len(windows)} windows of {cfg.seq_len} bytes of held-out text:")
    print(f"  logits        up to {largest:.2f}; largest difference {difference:.1e}")
    print(f"  loss          {our_loss:.6f} in PyTorch, {their_loss:.6f} in Core AI's runtime")
    print(f"  after         {shown(prompt)}")
    print(f"  PyTorch       {shown(texts[0])}")
    print(f"  the runtime   {shown(texts[1])}")

    problems = []
    if not difference <= allowed:
        problems.append(f"logits differ by {difference:.1e}, rounding explains {allowed:.1e}")
    if not abs(our_loss - their_loss) <= allowed:
        problems.append(f"losses differ by {abs(our_loss - their_loss):.1e}")
    position = first_difference(*texts)
    if position is not None:
        context = torch.zeros(1, cfg.seq_len, dtype=torch.long)
        context[0, : PROMPT + position] = torch.cat([prompt, texts[0][:position]])
        best, next_best = eager(context)[0, PROMPT + position - 1].topk(2).values
        if best - next_best > 2 * allowed:
            problems.append(f"the continuations differ at byte {position}, which was no tie")
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, help="of train_lm.py; its first model is taken")
    parser.add_argument(
        "--steps", type=int, default=20, help="to train without a checkpoint (%(default)s)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/convert"), help="folder of the program (%(default)s)"
    )
    args = parser.parse_args()
    # Of torch about its own copying of exported programs, once for each.
    warnings.filterwarnings("ignore", message=".*treespec, LeafSpec", category=FutureWarning)
    if not hasattr(coreai_torch, "converter"):  # said before the training and not after it
        parser.error(f"Apple's converter is not here: {INSTALL}; python -m coreai_torch says more")

    model, cfg = trained(args)
    model.eval()
    example = torch.zeros(1, cfg.seq_len, dtype=torch.long)
    program = convert(model, (example,), input_names=["tokens"], output_names=["logits"])
    found = show_composites(program)
    path = args.out / "language_model.aimodel"
    program.save_asset(path)
    print(f"Saved as {path}.")

    with torch.no_grad(), load(path) as run:
        problems = compare(model, lambda tokens: run(tokens=tokens)["logits"], cfg)
    if not found:
        problems.append("no norm became a composite op")
    print(*problems or ["Both agree within float32 rounding."], sep="\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
