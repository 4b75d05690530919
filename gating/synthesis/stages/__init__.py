"""What a run makes: domains, stages, tasks, their answers' schemas, and the records that are kept. Asks nobody."""
