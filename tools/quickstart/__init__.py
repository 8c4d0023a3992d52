"""The quick start's base model: its tokenizer and its pre-training."""
