"""Data: files to rows, rows to prompts and dialogues, these to tokens; and back to files that others read."""
