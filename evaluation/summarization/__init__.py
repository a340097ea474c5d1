"""Summaries of pairs of text and summary, scored by ROUGE."""
