"""`ultrafuser chat`: a conversation in the terminal with a running server, through the official client. Knows the
server by its API only; imports no vLLM and no torch."""
