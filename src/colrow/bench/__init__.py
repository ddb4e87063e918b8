"""What a step costs, beside a baseline."""
