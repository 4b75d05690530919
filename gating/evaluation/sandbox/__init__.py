"""Programs out of answers, run limited and killed. Knows no benchmark."""
