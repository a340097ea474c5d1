"""Lightning callbacks that observe and report; training is bit-identical without them."""
