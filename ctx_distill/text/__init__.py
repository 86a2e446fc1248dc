"""Reports: sections, sentences, findings with assertion, prompts, tokenizers."""
