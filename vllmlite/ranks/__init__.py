"""Several processes ("ranks") that compute one model together, and the process that drives them."""
