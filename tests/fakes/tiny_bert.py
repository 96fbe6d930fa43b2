"""A BERT of a few kilobytes with random weights, and a tokenizer for it, in transformers' or in sentence-transformers' layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from .tiny_llama import WORDS

CONTEXT = 40
DIMENSIONS = 32
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def make_encoder(directory: Path, architecture: str = "BertModel", **config: Any) -> Path:
    """Write the checkpoint of a body or of a model with a head."""
    import torch
    import transformers

    words = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    words.normalizer = normalizers.BertNormalizer()
    words.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    words.train_from_iterator([WORDS] * 3, trainers.WordPieceTrainer(vocab_size=120, special_tokens=SPECIAL, show_progress=False))
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    wrapped: Any = transformers.PreTrainedTokenizerFast
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    wrapped(tokenizer_object=words, model_max_length=CONTEXT, **names).save_pretrained(directory)
    torch.manual_seed(0)
    # Large weights: else all vectors look alike, and a wrong one would pass for the right one.
    settings = transformers.BertConfig(
        vocab_size=words.get_vocab_size(), hidden_size=DIMENSIONS, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=CONTEXT, pad_token_id=0, initializer_range=0.4, **config,
    )  # fmt: skip
    getattr(transformers, architecture)(settings).save_pretrained(directory)
    return directory


def add_layout(
    directory: Path, *, pooling: str = "mean", normalize: bool = True, length: int = CONTEXT, general: dict[str, Any] | None = None
) -> Path:
    """Make it a directory of sentence-transformers."""
    kinds = ["Transformer", "Pooling", *(["Normalize"] if normalize else [])]
    paths = ["", "1_Pooling", "2_Normalize"]
    modules = [{"idx": i, "name": str(i), "path": paths[i], "type": f"sentence_transformers.models.{kinds[i]}"} for i in range(len(kinds))]
    (directory / "modules.json").write_text(json.dumps(modules))
    (directory / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": length, "do_lower_case": False}))
    (directory / "1_Pooling").mkdir()
    settings = {"word_embedding_dimension": DIMENSIONS, "pooling_mode": pooling}
    (directory / "1_Pooling/config.json").write_text(json.dumps(settings))
    (directory / "config_sentence_transformers.json").write_text(json.dumps(general or {}))
    return directory
