"""Suites of long-context tasks on one model: sources of examples, runs, tables and figures."""
