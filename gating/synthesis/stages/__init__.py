"""What a run makes: domains, stages, tasks, the schemas of answers, and the records that are kept. Does not ask."""
