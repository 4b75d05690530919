"""`ultrafuser doctor`: what this machine is, what a fusion lacks here, and the commands that get it. Reads, and changes
nothing; asks no network; knows no vLLM: the engine is only started to measure, in a process of its own."""
