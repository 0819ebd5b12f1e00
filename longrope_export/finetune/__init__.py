"""Fine-tuning under a LongRopeConfig: data, training, plans."""
