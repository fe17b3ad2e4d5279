"""Trainer: pre-trains vision models on shards, fine-tunes and evaluates them. Never imports the generator."""
