"""Streams fractal shards into a DDP trainer, pre-trains, fine-tunes and evaluates. Never imports the generator."""
