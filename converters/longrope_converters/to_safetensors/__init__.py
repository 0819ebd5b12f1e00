"""Export to a Hugging Face folder that every engine loads."""
