"""Real text: corpora, tokenizers, packing, pipelines."""
