"""Training: networks, losses, pseudo labels, the three phases, and the loop that runs them."""
