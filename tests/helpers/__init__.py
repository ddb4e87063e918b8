"""What several files of tests share: groups of ranks, commands, models, plans broken on purpose, and comparisons."""
