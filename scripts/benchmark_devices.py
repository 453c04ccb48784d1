"""Measures training on one device and on several: tokens a second and their ratio, from one call.

The whole batch is the same on any number of devices. It has random examples and weights, with the lengths of
scripts/benchmark_training.py, and the fast paths of the defaults or, with --fast, all of them. Each number of devices
is a training of its own, in fresh processes.

    python scripts/benchmark_devices.py --shape llama_1b --method mam
    python scripts/benchmark_devices.py --shape llama_1b --method mam --batch 32 --devices 1,2,4 --fast
    python scripts/benchmark_devices.py --shape llama_8b --method lora_ffn --sharding full
    python scripts/benchmark_devices.py --shape tiny_llama --device cpu

With --sharding full, several devices share the frozen weights, and one has them all.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))


@dataclass(frozen=True)
class Measured:
    """What one process saw of a training."""

    tokens_per_s: float  # of the whole batch, without padding
    step_s: float  # the median
    peak_bytes: int  # of this process's GPU; 0 on a CPU
    built_bytes: int  # when the model was there, before the first step
    losses: list[float]
    sum_s: float  # the median of adding up the gradients of all processes, by itself
    fast_paths: list[str]
    replay_failure: str | None  # why steps were not replayed as CUDA graphs


def measure(rank: int, port: int, number: int, args: argparse.Namespace, pipe: Any) -> None:
    """Train as one of `number` processes, and send what was measured. This is the main function of a process."""
    if args.device == "cuda":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(number)))
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[rank]
    import torch
    from benchmark_training import RUN, SHAPES, Bench, StopAfter
    from torch.distributed import TCPStore, destroy_process_group

    from peftbench.config.schema import Compile, Device, DType, Keep, Precision, list_modifications
    from peftbench.modification.attach import attach
    from peftbench.training.batching import Lengths
    from peftbench.training.checkpoint import Checkpoints
    from peftbench.training.devices import join_processes
    from peftbench.training.fit import Criterion, Monitor, Recipe, Resuming, fit_model
    from peftbench.training.sharding import shard_layers
    from peftbench.utils.team import ALONE

    torch.set_num_threads(max(1, torch.get_num_threads() // number))  # as `trainer.devices` does
    team = ALONE
    if number > 1:
        team = join_processes(TCPStore("127.0.0.1", port, number, False), rank, number)
    cuda = args.device == "cuda"
    shape = replace(SHAPES[args.shape], batch=args.batch or SHAPES[args.shape].batch)
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(shape, torch.device(args.device), args.steps, Path(scratch))
        run = bench.run(args.method)
        torch.manual_seed(0)
        model = build(shape, bench.device)
        run.model.dtype = DType.bfloat16 if cuda else DType.float32
        attach(model, list_modifications(run), run.unfreeze, untrained=[])
        if args.sharding == "full" and number > 1:
            shard_layers(model, team, bench.device)
        model.to(bench.device)
        built = torch.cuda.memory_allocated() if cuda else 0
        settings = replace(
            run.trainer,
            compile=Compile.layers if args.fast else Compile.none,
            batch_size=shape.batch,
            batch_tokens=None,
            accumulation=1,
            gradient_checkpointing=args.checkpointing,
            max_steps=RUN,
            keep=Keep.last,
            evaluate_every=None,
            warmup=0.0,
            precision=Precision.bf16 if cuda else Precision.fp32,
            device=Device.cuda if cuda else Device.cpu,
        )
        losses: list[float] = []
        fitted = fit_model(
            model.train(),
            bench.data,  # type: ignore[arg-type]  # it has what fit reads of a TaskData
            Recipe(settings, seed=1),
            Criterion(evaluate=dict, metric="loss"),
            Resuming(Checkpoints(Path(scratch), 1e9, "")),
            Monitor(
                log=lambda values: losses.append(values["loss"]) if "loss" in values else None,
                callbacks=[StopAfter(args.warm_up + args.steps)],
            ),
            team,
        )
        step_s = statistics.median(fitted.step_seconds[args.warm_up :])
        lengths = Lengths.of(bench.data, encoder_decoder=model.config.is_encoder_decoder)  # type: ignore[arg-type]  # as above
        tokens = shape.batch * lengths.mean
        counted = fitted.step_seconds[args.warm_up :]
        peak = torch.cuda.max_memory_allocated() if cuda else 0
        gradients = [torch.zeros_like(p) for p in model.parameters() if p.requires_grad]
        sums = [_time(lambda: team.add_up(gradients), cuda) for _ in range(12)]
        rate = tokens * len(counted) / sum(counted)
        paths = (fitted.fast_paths, fitted.replay_failure)
        pipe.send(Measured(rate, step_s, peak, built, losses, statistics.median(sums[2:]), *paths))
    if number > 1:
        destroy_process_group()


def _time(function: Callable[[], None], cuda: bool) -> float:
    """Return the seconds that a call takes, on the GPU too."""
    import torch

    began = time.perf_counter()
    function()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def build(shape: Any, device: Any) -> Any:
    """Return a shape's model on the CPU with random weights, bfloat16 for a GPU, which draws those of decoders."""
    import torch

    if device.type == "cpu" or not shape.alone:
        return shape.model().to(torch.float32 if device.type == "cpu" else torch.bfloat16)
    with torch.device("meta"):
        model = shape.model().to(torch.bfloat16)
    model.to_empty(device="cpu")
    model.tie_weights()
    for parameter in model.parameters():
        drawn = torch.randn if parameter.dim() > 1 else torch.ones
        value = drawn(parameter.shape, device=device, dtype=parameter.dtype)
        parameter.data.copy_(value.mul_(0.02) if parameter.dim() > 1 else value)
        del value
    for name, module in list(model.named_modules()):
        if "rotary_emb" in name:  # its frequencies are no parameters
            model.set_submodule(name, type(module)(model.config))
    torch.cuda.empty_cache()
    return model


def train_on(number: int, args: argparse.Namespace) -> list[Measured]:
    """Return what each of `number` processes measured."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, number, True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for rank in range(number):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=measure, args=(rank, store.port, number, args, theirs), daemon=True)
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    try:
        return [pipe.recv() for pipe in pipes]
    except EOFError:
        sys.exit("a process of the benchmark has ended; what it said is above.")
    finally:
        for process in processes:
            process.join(20)
            process.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama_1b", help="a shape of scripts/benchmark_training.py")
    parser.add_argument("--method", default="mam", help="a preset that adds parameters, such as mam or lora_ffn")
    parser.add_argument("--devices", default="1,2", help="numbers of devices, separated by commas")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--batch", type=int, help="examples in the whole batch; by default the shape's")
    parser.add_argument("--steps", type=int, default=40, help="steps counted")
    parser.add_argument("--warm-up", type=int, default=80, help="uncounted steps, in which graphs are recorded")
    parser.add_argument("--fast", action="store_true", help="compile the layers too")
    parser.add_argument("--sharding", choices=("none", "full"), default="none", help="share the frozen weights")
    parser.add_argument("--checkpointing", action="store_true", help="compute activations again in the backward pass")
    parser.add_argument("--out", type=Path, help="write all numbers to this JSON file")
    args = parser.parse_args()
    found: dict[int, list[Measured]] = {}
    print(
        f"{'devices':<9}{'tokens/s':>12}{'x 1st':>8}{'step ms':>10}{'GiB built':>11}{'GiB peak':>10}{'sum ms':>8}"
        f"{'last loss':>11}"
    )
    for number in map(int, args.devices.split(",")):
        found[number] = train_on(number, args)
        first, here = next(iter(found.values()))[0], found[number][0]
        built, peak = (max(getattr(each, name) for each in found[number]) for name in ("built_bytes", "peak_bytes"))
        print(
            f"{number:<9}{here.tokens_per_s:>12,.0f}{here.tokens_per_s / first.tokens_per_s:>8.2f}"
            f"{1000 * here.step_s:>10.1f}{built / 2**30:>11.2f}{peak / 2**30:>10.2f}{1000 * here.sum_s:>8.2f}"
            f"{here.losses[-1] if here.losses else math.nan:>11.4f}",
            flush=True,
        )
        print(f"         {', '.join(here.fast_paths)} {here.replay_failure or ''}", flush=True)
    if args.out:
        measured = {number: [asdict(each) for each in ranks] for number, ranks in found.items()}
        args.out.write_text(json.dumps({**vars(args), "date": time.strftime("%F"), "found": measured}, default=str))


if __name__ == "__main__":
    main()
