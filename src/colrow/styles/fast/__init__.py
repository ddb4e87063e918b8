"""Fast styles: local tensors, flattened tokens, explicit collectives."""
