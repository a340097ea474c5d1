"""Scoring of finished models: numbers with their protocol, tables and figures. No training code."""
