"""This package turns lists of files into episodes of tensors."""
