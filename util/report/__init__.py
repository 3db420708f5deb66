"""This package makes tables of runs, beside the paper's."""
