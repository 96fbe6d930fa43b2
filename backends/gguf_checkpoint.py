"""A small Llama in a GGUF file, written out as a checkpoint directory that transformers and vLLM read.

transformers can read GGUF itself, but keeps the weights packed (slow on a CPU), takes ten seconds for the tokenizer and needs accelerate.
"""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any, TypeAlias

import gguf
import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from .model_errors import ModelUnavailable

_CONTROL = 3
"""GGUF's token type of special tokens."""

_WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_PER_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

_SPECIAL = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
"""transformers' and GGUF's names of the special tokens."""

Fields: TypeAlias = dict[str, Any]


def convert(source: Path, target: Path) -> None:
    """Write the GGUF file `source` as the new directory `target`: bfloat16 safetensors, configs and tokenizer with chat template.

    Only the kind of the small model is known: architecture ``llama`` with the ``smollm`` tokenizer.
    """
    reader = gguf.GGUFReader(source)
    fields: Fields = {name: field.contents() for name, field in reader.fields.items()}
    kind = (fields["general.architecture"], fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"])
    if kind != ("llama", "gpt2", "smollm"):
        raise ModelUnavailable(f"{source.name} is {'/'.join(kind)}: only llama/gpt2/smollm GGUF files can be converted")
    target.mkdir()
    weights = _weights(reader, {"attn_q": fields["llama.attention.head_count"], "attn_k": fields["llama.attention.head_count_kv"]})
    try:
        save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    except SafetensorError as error:  # the only form in which it tells of a full disk
        raise OSError(errno.ENOSPC if "os error 28" in str(error) else errno.EIO, str(error)) from error
    _tokenizer(fields).save(str(target / "tokenizer.json"))
    _write(target / "tokenizer_config.json", _tokenizer_config(fields))
    _write(target / "generation_config.json", _special_ids(fields))
    _write(target / "config.json", _config(fields, tied="lm_head.weight" not in weights))


def _weights(reader: Any, heads: dict[str, int]) -> dict[str, torch.Tensor]:
    out = {}
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        weight = torch.from_numpy(np.array(values, dtype=np.float32))
        stem = tensor.name.removesuffix(".weight")
        if stem in _WHOLE:
            name = _WHOLE[stem]
        else:
            _, layer, part = stem.split(".")
            name = f"model.layers.{layer}.{_PER_LAYER[part]}"
            if part in heads:
                # GGUF interleaves the two rotary halves of each head; transformers keeps them one after the other.
                rows, columns = weight.shape
                weight = weight.reshape(heads[part], rows // heads[part] // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
        out[f"{name}.weight"] = weight.to(torch.bfloat16).contiguous()
    return out


def _config(fields: Fields, *, tied: bool) -> dict[str, Any]:
    heads, width = fields["llama.attention.head_count"], fields["llama.embedding_length"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "hidden_size": width,
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "head_dim": width // heads,
        "max_position_embeddings": fields["llama.context_length"],
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        # GGUF holds it as a float32: 1e-05 comes back as 9.99999974e-06.
        "rms_norm_eps": float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_theta": fields["llama.rope.freq_base"],
        "tie_word_embeddings": tied,
        **_special_ids(fields),
    }


def _special_ids(fields: Fields) -> dict[str, int]:
    return {f"{name}_token_id": fields[f"tokenizer.ggml.{key}_token_id"] for name, key in _SPECIAL.items() if name != "unk"}


def _tokenizer(fields: Fields) -> Tokenizer:
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = fields["tokenizer.ggml.token_type"]
    special = [AddedToken(token, special=True, normalized=False) for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL]
    tokenizer.add_special_tokens(special)
    return tokenizer


def _tokenizer_config(fields: Fields) -> dict[str, Any]:
    tokens = fields["tokenizer.ggml.tokens"]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{name}_token": tokens[fields[f"tokenizer.ggml.{key}_token_id"]] for name, key in _SPECIAL.items()},
        "model_max_length": fields["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "chat_template": fields["tokenizer.chat_template"],
    }


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
