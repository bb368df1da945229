"""Divergences between next-token distributions, one value per token; `base` says what each of them is given and gives."""
