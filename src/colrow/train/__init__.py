"""One step and what surrounds it: optimizer, schedule, evaluation, metrics."""
