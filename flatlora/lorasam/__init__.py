"""LoRASAM: train uphill of the weights, along the last gradient."""
