"""From a recipe and the command line to objects: compose, check, build, keep the run folder.

The only room that knows Hydra. Everything it builds takes plain typed arguments.
"""
