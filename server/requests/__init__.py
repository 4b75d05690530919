"""What a request may say: bodies, bounds, what is not fused, constraints. Knows no engine and answers nothing."""
