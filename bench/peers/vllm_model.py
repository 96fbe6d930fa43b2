"""A model folder for vLLM's server that costs next to nothing to compute, run by vLLM's own Python. Its weights are random.

PYTHON -I vllm_model.py FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WORDS = 256
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": WORDS,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 2048,
    "torch_dtype": "bfloat16",
}

if __name__ == "__main__":
    folder = sys.argv[1]
    # As long as the other peers' tokens.
    vocabulary = {f"{k:0>19}": k for k in range(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=f"{0:0>19}"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    made: Any = PreTrainedTokenizerFast
    made(tokenizer_object=tokenizer, unk_token=f"{0:0>19}", eos_token=f"{1:0>19}").save_pretrained(folder)
    Path(folder, "config.json").write_text(json.dumps(CONFIG))
