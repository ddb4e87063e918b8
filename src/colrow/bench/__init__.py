"""What a step costs, beside a baseline."""

JOB = "--job"
"""The first word of `colrow bench` on a rank, before the file with its job: see `run_arm`."""
