"""What a model takes and how fast it runs, by arithmetic: no GPU, no weights, only its shape."""
