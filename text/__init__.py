"""Text in, batches of tokens out: tokenizers, instruction files, batches, question files, a toy world."""
