"""The paper's network: one file for each box of its figure 3, the losses, and the prototype bank."""

IGNORE = 255
"""Mask value of pixels that count nowhere: object borders, padding."""
