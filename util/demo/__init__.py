"""This package is the page that demo.py serves."""
