"""FineQuant as a torch.compile backend."""
