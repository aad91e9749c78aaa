"""How a batch becomes a loss: one module for each method."""
