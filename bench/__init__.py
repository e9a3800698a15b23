"""How fast each part of the training is, beside a plain version of it: python -m bench."""
