"""Running a model on shapes alone: what `dry_run` is made of."""
