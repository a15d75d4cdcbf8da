"""Text in, batches of tokens out: tokenizers, instruction and question files, a toy world."""
