"""The machine: its devices, the precision it has units for, and how fast it is. Nothing here knows of models."""
