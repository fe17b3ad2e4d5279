"""The shard contract: format, manifest, reading, verifying. Imports neither numba nor torch."""
