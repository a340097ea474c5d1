"""Wiring: which model, which loss, what to log, which optimiser."""
