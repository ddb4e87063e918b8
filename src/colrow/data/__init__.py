"""Corpora, tokenizer, token shards, batch order."""
