"""Compares fine-tunings: mean and spread over seeds of the accuracy after the last epoch."""
