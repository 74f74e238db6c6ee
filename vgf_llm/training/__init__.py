"""Fine-tuning: what a step computes, the trainer around it, and checkpoints that are whole or absent."""
