"""Continuations of prompts, with or without documents: the work behind ``generate.py``."""
