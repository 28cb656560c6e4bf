"""One fine-tuning run: its step, its folder, its records."""
