"""The acting arm: from a model to a selection, to layers held frozen, to a handle that ends it."""
