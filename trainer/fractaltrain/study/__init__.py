"""Studies: a grid of pre-training sets, models and fine-tuning sets, written down in one TOML file."""
