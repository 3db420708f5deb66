"""Segmentation of a user's own images: the Python API, what predict.py and demo.py share, training-free baselines."""
