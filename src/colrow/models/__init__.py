"""Single-device models, and the one builder of them."""
