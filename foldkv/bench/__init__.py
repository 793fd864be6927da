"""How fast attention over a cache is: our modes beside PyTorch's and the memory's own read rate, in one run."""
