"""The fused model as data and mathematics: fusion file, gate, reference. Knows nothing of servers, requests or vLLM."""
