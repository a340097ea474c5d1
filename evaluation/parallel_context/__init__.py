"""Contexts encoded in pieces side by side: perplexity of the text behind them, by degree."""
