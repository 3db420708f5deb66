IGNORE = 255
"""Mask value of pixels that count nowhere: object borders, padding."""
