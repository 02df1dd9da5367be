"""Files on disk: atomic replacement, bounded parsing of untrusted files, safetensors and JSON."""
