"""LoRA-GGPO: train under weight noise."""
