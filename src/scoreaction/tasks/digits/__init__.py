"""Handwritten digits: networks, data and pretraining."""
