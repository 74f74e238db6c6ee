"""Uncertainty of measured figures."""
