"""How a new model earns its traffic: look, judge, move, record."""
