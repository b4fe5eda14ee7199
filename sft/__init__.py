"""Light supervised fine-tuning, thin over TRL."""
