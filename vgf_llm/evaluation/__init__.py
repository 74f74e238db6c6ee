"""Evaluation: arms that share their samples, what is measured on each response, intervals, tables."""
