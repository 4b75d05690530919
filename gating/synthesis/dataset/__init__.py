"""From a run's records to a data set: duplicates, test questions, card, statistics, map. Makes no calls."""
