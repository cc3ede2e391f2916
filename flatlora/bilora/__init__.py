"""Bi-LoRA: an auxiliary adapter ascends while the primary descends."""
