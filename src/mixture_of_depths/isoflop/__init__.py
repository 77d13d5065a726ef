"""IsoFLOP studies: families of models, trained in many sizes to the same FLOPs, compared at their optima."""
