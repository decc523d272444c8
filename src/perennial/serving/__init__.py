"""How is a model asked: KServe servers for the predictor and for the transformer beside it."""
