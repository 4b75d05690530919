"""From a command to a serving process and back: port, child processes, progress, the end. Knows no request."""
