"""The decoder families the torch backend runs, from Hugging Face checkpoints."""
