"""Measures a training step next to a backbone in NF4: MAM, LoRA and peft's LoRA, step time and peak memory.

The backbone has Llama-3.1-8B's shape and random weights, which are drawn and packed on the device layer by layer. Each
method is trained alone, with gradient checkpointing and AdamW, on random tokens that are all predicted.

    python scripts/benchmark_quantised.py --out quantised.json
    python scripts/benchmark_quantised.py --tiny
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.quantizers import AutoHfQuantizer

from peftbench.backbones.precision import autocast
from peftbench.backbones.quantisation import settle_quantised
from peftbench.config.compose import compose_run
from peftbench.config.schema import list_modifications
from peftbench.modification.attach import attach
from peftbench.modification.counting import count
from peftbench.training.fit import checkpoint_gradients
from peftbench.training.token_loss import TokenLoss, find_output_layer

LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "rope_theta": 500000.0,
    "max_position_embeddings": 8192,
}
TINY = {**LLAMA_8B, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY |= {"num_key_value_heads": 2, "vocab_size": 512}
RANK = 32  # r of LoRA at the four projections of the FFN and of peft's
WARM_UP = 2  # uncounted steps


def build_packed(shape: dict[str, float], device: torch.device) -> PreTrainedModel:
    """Return the model with its layers' projections in NF4, of which no more than one is ever unpacked."""
    import bitsandbytes as bnb
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    packing = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["lm_head"],
    )
    config = LlamaConfig(**shape, attention_dropout=0.0, use_cache=False, tie_word_embeddings=False)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(dtype)
    replace_with_bnb_linear(model, ["lm_head"], packing)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            value = torch.ones if parameter.dim() == 1 else torch.randn
            drawn = value(parameter.shape, device=device, dtype=dtype) * (1.0 if parameter.dim() == 1 else 0.02)
            if isinstance(module, bnb.nn.Linear4bit):
                packed = bnb.nn.Params4bit(drawn, requires_grad=False, quant_type="nf4", module=module)
                module.weight = packed.to(device)
            else:
                setattr(module, name, nn.Parameter(drawn, requires_grad=False))
    with device:
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    model.hf_quantizer = AutoHfQuantizer.from_config(packing)
    model.config.quantization_config, model.is_loaded_in_4bit = packing, True
    settle_quantised(model, "the random model", dtype)
    return model


def prepare_ours(model: PreTrainedModel, overrides: list[str]) -> Callable[[dict[str, Tensor]], Tensor]:
    """Attach a method and return the function of its loss, the fused one."""
    run = compose_run([*overrides, "task=text_to_text", "model=llama"], reads_data=False)
    attach(model, list_modifications(run))
    model.train()
    checkpoint_gradients(model)
    layer = find_output_layer(model)
    assert layer is not None
    print(f"  {count(model).percent(count(model).trained):.3f}% of the backbone trained")
    return TokenLoss(model, layer, 0.0)


def prepare_peft(model: PreTrainedModel) -> Callable[[dict[str, Tensor]], Tensor]:
    """Adapt the model as peft's users do, and return the function of its loss."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    names = ["gate_proj", "up_proj", "down_proj"]
    adapted = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=names, task_type="CAUSAL_LM"))
    adapted.train()
    dtype = torch.bfloat16 if next(model.parameters()).device.type == "cuda" else None

    def compute_loss(inputs: dict[str, Tensor]) -> Tensor:
        with autocast(inputs["input_ids"].device, dtype):
            loss: Tensor = adapted(**inputs).loss
        return loss

    return compute_loss


METHODS: dict[str, Callable[[PreTrainedModel], Callable[[dict[str, Tensor]], Tensor]]] = {
    "lora": lambda model: prepare_ours(model, ["method=lora_ffn", f"bottleneck={RANK}"]),
    "mam": lambda model: prepare_ours(model, ["method=mam", "bottleneck=64", "mix.attention.bottleneck=16"]),
    "peft lora": prepare_peft,
}


def measure(name: str, shape: dict[str, float], tokens: int, steps: int, device: torch.device) -> dict[str, float]:
    """Train a method for some steps; return the median step and the peak of memory."""
    cuda = device.type == "cuda"
    torch.manual_seed(0)
    model = build_packed(shape, device)
    held = torch.cuda.memory_allocated() if cuda else 0
    compute_loss = METHODS[name](model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=cuda)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds, losses = [], []
    for _ in range(WARM_UP + steps):
        ids = torch.randint(5, int(shape["vocab_size"]), (1, tokens), device=device)
        began = time.perf_counter()
        loss = compute_loss({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids})
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())  # waits for the GPU
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    peak = torch.cuda.max_memory_allocated() if cuda else 0
    return {
        "step_ms": 1000 * statistics.median(seconds[WARM_UP:]),
        "peak_gib": peak / 2**30,
        "backbone_gib": held / 2**30,
        "loss": losses[-1],
    }


def main() -> None:
    """Measure the methods in turn, and print and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="two narrow layers on the CPU: that it runs")
    parser.add_argument("--only", default=",".join(METHODS), help="methods, separated by commas")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    device = torch.device("cpu" if arguments.tiny else "cuda")
    shape, tokens = (TINY, 32) if arguments.tiny else (LLAMA_8B, arguments.tokens)
    found = {}
    for name in arguments.only.split(","):
        print(name)
        found[name] = measure(name, shape, tokens, arguments.steps, device)
        print("  " + ", ".join(f"{key} {value:.2f}" for key, value in found[name].items()))
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if arguments.out is not None:
        arguments.out.write_text(json.dumps({"torch": torch.__version__, "tokens": tokens, **found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
