"""Masked language models of transformers at random sizes, in folders as `save_pretrained` leaves them."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch

ESM = ["<cls>", "<pad>", "<eos>", "<unk>", *"LAGVSERTIDPKQNFYMHWCXBUZO", ".", "-", "<null_1>", "<mask>"]
BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "a", "red", "blue", "cat", "dog", "sat", "ran", "."]


def esm() -> tuple[Any, Any]:
    """An ESM2 and its tokenizer."""
    from transformers import EsmConfig, EsmForMaskedLM, EsmTokenizer

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "vocab.txt").write_text("\n".join(ESM))
        tokenizer = EsmTokenizer(str(Path(folder) / "vocab.txt"))
    torch.manual_seed(0)
    config = EsmConfig(
        vocab_size=len(ESM), mask_token_id=len(ESM) - 1, pad_token_id=1, hidden_size=16, num_hidden_layers=1,
        num_attention_heads=2, intermediate_size=32, max_position_embeddings=66, position_embedding_type="rotary",
        token_dropout=True, emb_layer_norm_before=False,
    )  # fmt: skip
    return EsmForMaskedLM(config), tokenizer


def bert() -> tuple[Any, Any]:
    """A BERT and its tokenizer."""
    from transformers import BertConfig, BertForMaskedLM, BertTokenizer

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(BERT), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=12, pad_token_id=0,
    )  # fmt: skip
    return BertForMaskedLM(config), BertTokenizer(vocab={token: number for number, token in enumerate(BERT)})


@cache
def folder(kind: str) -> Path:
    """The folder of a model, `esm` or `bert`, that is there until the process ends."""
    kept = Path(tempfile.mkdtemp(prefix=f"tiny_{kind}_"))
    lm, tokenizer = {"esm": esm, "bert": bert}[kind]()
    lm.save_pretrained(kept)
    tokenizer.save_pretrained(kept)
    return kept
