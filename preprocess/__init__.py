"""Raw text to stores on disk; idempotent, resumable, every store carries its identity."""
