"""Fine-tuning under one set of factors, and whole plans of searching, tuning, recovering, exporting."""
