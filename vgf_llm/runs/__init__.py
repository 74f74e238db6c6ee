"""A run on disk: files that survive a kill, who may write into a folder, checkpoints that are whole or absent."""
