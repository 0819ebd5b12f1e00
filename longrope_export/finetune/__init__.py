"""Fine-tuning of a model under a LongRopeConfig."""
