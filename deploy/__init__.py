"""Files that run the server in production, and what writes and checks them. No part of the installed package."""
