"""Files on disk: replaced whole, believed only within limits, as safetensors and as JSON."""
