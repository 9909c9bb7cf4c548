"""How tokens are decoded and evaluated: models, caches, attention, the block-parallel evaluator."""
