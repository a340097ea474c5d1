"""Inference-time methods over unchanged Hugging Face decoders: options in frozen dataclasses, context managers."""
