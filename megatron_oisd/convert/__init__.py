"""Checkpoint converters between Hugging Face and Megatron-Core, and weight export from a live model."""
