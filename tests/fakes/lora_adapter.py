"""A LoRA adapter with random weights, as peft writes one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RANK, ALPHA = 8, 16
TARGETS = ("q_proj", "v_proj")


def make_adapter(directory: Path, base: str) -> Path:
    """Write one for the Llama in `base`. Strong enough to change what the model says."""
    import torch
    from safetensors.torch import save_file

    directory.mkdir(parents=True)
    config = json.loads((Path(base) / "config.json").read_text())
    hidden, head = config["hidden_size"], config["hidden_size"] // config["num_attention_heads"]
    widths = {"q_proj": hidden, "v_proj": head * config["num_key_value_heads"]}
    random = torch.Generator().manual_seed(0)
    weights: dict[str, Any] = {}
    for layer in range(config["num_hidden_layers"]):
        for target in TARGETS:
            name = f"base_model.model.model.layers.{layer}.self_attn.{target}"
            weights[f"{name}.lora_A.weight"] = 0.05 * torch.randn(RANK, hidden, generator=random)
            weights[f"{name}.lora_B.weight"] = 0.15 * torch.randn(widths[target], RANK, generator=random)
    save_file(weights, directory / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA, "target_modules": list(TARGETS)}
    settings |= {"bias": "none", "lora_dropout": 0.0, "base_model_name_or_path": base, "inference_mode": True}
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    return directory


def merge(model: Any, directory: Path) -> None:
    """Add the adapter to a transformers model's own weights: W + alpha / r * B A."""
    import torch
    from safetensors.torch import load_file

    weights = load_file(directory / "adapter_model.safetensors")
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name in weights:
            if name.endswith(".lora_A.weight"):
                target = name.removeprefix("base_model.model.").replace(".lora_A.", ".")
                parameters[target] += ALPHA / RANK * (weights[name.replace("lora_A", "lora_B")] @ weights[name])
