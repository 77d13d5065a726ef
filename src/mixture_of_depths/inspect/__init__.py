"""See where a model spends its compute: traces of texts, and pages and figures drawn from them."""
