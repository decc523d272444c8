"""Raw rows from files or the simulator, and the examples made from them."""
