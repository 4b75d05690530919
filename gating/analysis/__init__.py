"""`ultrafuser analyze`: what a gate does, as numbers, pictures and a page, and runs' curves. Trains nothing."""
