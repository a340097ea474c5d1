"""Readers of the stores on disk, and what hands out batches of one documented dict (``datamodules.batch``)."""
