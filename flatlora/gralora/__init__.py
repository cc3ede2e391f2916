"""GraLoRA: block-wise low rank."""
