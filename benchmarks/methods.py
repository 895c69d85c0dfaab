"""What EWC and PathWeave cost beside plain LoRA, on a model with the proportions of Llama-3-8B.

    python benchmarks/methods.py

Width 512 and rank 16 stand to each other as 4096 and 128. All variants are measured in turns in
one process; a ratio is the median over the turns of CPU seconds, on one thread: several would count
how they wait for each other. Before, outputs are compared.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from mera_ds.config import LoraConfig
from mera_ds.deltas import WeightedDelta
from mera_ds.machine import commit
from mera_ds.model.lora import attach_lora, fold_deltas, linear_layers, lora_parameters
from mera_ds.model.weave import attach_woven, weave, woven_parameters
from mera_ds.train.penalty import ANCHOR, IMPORTANCE, add_penalty_gradient, kept_as

STAGES = 4
Step = Callable[[], None]


def main() -> None:
    """Measure, print a table and write `methods.json` and `methods.md`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=320)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LoraConfig(rank=arguments.hidden // 32, alpha=float(arguments.hidden // 32))
    shape = (arguments.batch, arguments.tokens)
    inputs = torch.randint(0, 4096, shape, device=arguments.device)
    deltas = _deltas(_llm(arguments), config)
    training = _training(arguments, config, deltas, inputs)
    inference = _inference(arguments, config, deltas, inputs)
    results = {
        "hardware": _hardware(arguments.device),
        "commit": commit(),
        "settings": {key: str(value) for key, value in vars(arguments).items() if key != "results"},
        "training step / plain LoRA": _ratios(training, "lora", arguments),
        "prefill / plain LoRA": _ratios(inference["prefill"], "lora", arguments),
        "one token / plain LoRA": _ratios(inference["token"], "lora", arguments),
    }
    arguments.results.mkdir(parents=True, exist_ok=True)
    text = _markdown(results)
    (arguments.results / "methods.json").write_text(json.dumps(results, indent=2) + "\n")
    (arguments.results / "methods.md").write_text(text)
    print(text)


def _llm(arguments: argparse.Namespace) -> PreTrainedModel:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=arguments.hidden,
        intermediate_size=arguments.hidden * 7 // 2,
        num_hidden_layers=arguments.layers,
        num_attention_heads=8,
        num_key_value_heads=2,
    )
    llm = LlamaForCausalLM(config).to(arguments.device)
    llm.requires_grad_(False)
    return llm


def _deltas(llm: PreTrainedModel, config: LoraConfig) -> list[WeightedDelta]:
    """Return a pair for each stage."""
    found = []
    for stage in range(STAGES):
        tensors = {}
        for name, layer in linear_layers(llm).items():
            tensors[f"{name}.lora_A"] = torch.randn(config.rank, layer.in_features) / 50
            tensors[f"{name}.lora_B"] = torch.randn(layer.out_features, config.rank) / 50
        found.append(WeightedDelta(tensors, 1.0, f"stage {stage + 1}"))
    return found


def _training(
    arguments: argparse.Namespace,
    config: LoraConfig,
    deltas: list[WeightedDelta],
    inputs: Tensor,
) -> dict[str, Step]:
    """Return a training step of each method at the fourth stage."""
    steps = {}
    for name in ("lora", "ewc"):
        llm = _llm(arguments)
        attach_lora(llm, config)
        held = _held(lora_parameters(llm)) if name == "ewc" else {}
        steps[name] = _step(llm.train(), lora_parameters(llm), held, inputs)
    llm = _llm(arguments)
    weave(llm, deltas[:-1], config, "random", {})
    steps["pathweave"] = _step(llm.train(), woven_parameters(llm), {}, inputs)
    return steps


def _held(parameters: Mapping[str, nn.Parameter]) -> dict[nn.Parameter, dict[str, Tensor]]:
    kept = kept_as("fp32")
    return {
        entry: {
            IMPORTANCE: torch.rand_like(entry).to(kept[IMPORTANCE]),
            ANCHOR: entry.detach().clone().to(kept[ANCHOR]),
        }
        for entry in parameters.values()
    }


def _step(
    llm: PreTrainedModel,
    parameters: Mapping[str, nn.Parameter],
    held: Mapping[nn.Parameter, Mapping[str, Tensor]],
    inputs: Tensor,
) -> Step:
    optimizer = torch.optim.AdamW(list(parameters.values()), lr=1e-4)
    labels = inputs[:, -16:]

    def step() -> None:
        hidden = llm.base_model(input_ids=inputs, use_cache=False).last_hidden_state[:, -16:]
        logits = llm.get_output_embeddings()(hidden).flatten(0, 1)
        nn.functional.cross_entropy(logits, labels.flatten()).backward()
        for master, state in held.items():
            add_penalty_gradient(master, state, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _inference(
    arguments: argparse.Namespace,
    config: LoraConfig,
    deltas: list[WeightedDelta],
    inputs: Tensor,
) -> dict[str, dict[str, Step]]:
    """Return forward passes: over a prompt, and over one more token behind it."""
    merged, lora, stacked, woven = (_llm(arguments) for _ in range(4))
    fold_deltas(merged, [WeightedDelta(_on(deltas[-1], arguments.device), 1.0, "newest")])
    attach_lora(lora, config)
    with torch.no_grad():
        for name, parameter in lora_parameters(lora).items():
            parameter.copy_(deltas[-1].tensors[name])
    weave(woven, deltas[:-1], config, "random", {})
    tensors = {}
    with torch.no_grad():
        for name, parameter in woven_parameters(woven).items():
            if name in deltas[-1].tensors:
                parameter.copy_(deltas[-1].tensors[name])
            else:
                tensors[name] = parameter.detach().clone()
    attach_woven(stacked, deltas, tensors)
    models = {"merged": merged, "lora": lora, "pathweave": stacked}
    with torch.no_grad():
        same = {name: llm.eval()(input_ids=inputs).logits for name, llm in models.items()}
        torch.testing.assert_close(same["merged"], same["lora"], rtol=1e-3, atol=1e-3)
        expected = woven.eval()(input_ids=inputs).logits
        torch.testing.assert_close(same["pathweave"], expected, rtol=1e-3, atol=1e-3)
    return {
        "prefill": {name: _forward(llm, inputs) for name, llm in models.items()},
        "token": {name: _forward(llm, inputs[:1, :1]) for name, llm in models.items()},
    }


def _on(delta: WeightedDelta, device: str) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in delta.tensors.items()}


def _forward(llm: PreTrainedModel, inputs: Tensor) -> Step:
    @torch.no_grad()
    def forward() -> None:
        llm.base_model(input_ids=inputs, use_cache=False)

    return forward


def _ratios(
    steps: Mapping[str, Step], base: str, arguments: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """Measure in turns; a turn repeats short steps until they can be timed."""
    spent: dict[str, list[float]] = {name: [] for name in steps}
    times = {name: _times(step, arguments.device) for name, step in steps.items()}
    count = max(times.values())
    for _ in range(arguments.repeats):
        for name, step in steps.items():
            spent[name].append(_seconds(step, count, arguments.device))
    return {
        name: {
            "milliseconds": 1000 * min(values) / count,
            "ratio": statistics.median(a / b for a, b in zip(values, spent[base], strict=True)),
        }
        for name, values in spent.items()
    }


def _times(step: Step, device: str) -> int:
    _seconds(step, 1, device)
    return max(1, round(0.1 / _seconds(step, 1, device)))


def _seconds(step: Step, count: int, device: str) -> float:
    """Return CPU seconds of this process, or wall seconds on a GPU."""
    gpu = device != "cpu"
    clock = time.perf_counter if gpu else time.process_time
    started = clock()
    for _ in range(count):
        step()
    if gpu:
        torch.cuda.synchronize()
    return clock() - started


def _hardware(device: str) -> str:
    if device != "cpu":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    name = next((line.split(":")[1].strip() for line in lines if "model name" in line), "CPU")
    return f"{name}, {torch.get_num_threads()} threads, no GPU"


def _markdown(results: Mapping[str, object]) -> str:
    lines = [
        f"Stage {STAGES} of PathWeave; {results['hardware']}; commit {results['commit']}.",
        "",
        "| measured | method | ms | ratio |",
        "|---|---|---:|---:|",
    ]
    for title, rows in results.items():
        if isinstance(rows, dict) and title != "settings":
            for name, row in rows.items():
                lines.append(
                    f"| {title} | {name} | {row['milliseconds']:.1f} | {row['ratio']:.3f} |"
                )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
