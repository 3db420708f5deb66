"""This package builds, trains, saves and evaluates the network that a config describes."""
