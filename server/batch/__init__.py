"""`ultrafuser batch`: a file of requests in, a file of answers out, through the server's own routes in this process.
Knows files and ASGI; listens on no port, and does not know what is asked."""
