"""What a draft reads: corpora, prompts, and what the target writes itself."""
