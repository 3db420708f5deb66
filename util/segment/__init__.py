"""This package segments pictures of one's own, and draws what comes out."""
