"""A Llama of a few kilobytes with random weights, and a tokenizer for it: real enough to be compared with transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

CONTEXT = 128
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system prompts') }}{% endif %}"
    "<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
WORDS = "the quick brown fox jumps over the lazy dog and the small model answers with small words about a dog, a fox and a hat. "
SPECIAL = ["<pad>", "<s>", "</s>"]


def make_tokenizer() -> Tokenizer:
    """Byte-level BPE with 320 tokens, trained on WORDS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([WORDS] * 3, trainer)
    return tokenizer


def make_model(directory: Path, *, template: str | None = TEMPLATE) -> Path:
    """Write the checkpoint."""
    import torch
    import transformers

    tokenizer = make_tokenizer()
    wrapped: Any = transformers.PreTrainedTokenizerFast
    fast = wrapped(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", chat_template=template)
    fast.save_pretrained(directory)
    torch.manual_seed(0)
    # Large weights: else a random model says one word for ever, and every test of it would pass.
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=CONTEXT, bos_token_id=1, eos_token_id=2, pad_token_id=0, initializer_range=0.4,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(directory)
    return directory
