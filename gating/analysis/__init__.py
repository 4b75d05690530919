"""`ultrafuser analyze`: what a gate does, as numbers, pictures and a page; curves of runs. Does not train or serve."""
