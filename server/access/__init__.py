"""Who is let in, and how much: connections, hosts, keys, quotas, a full server. Reads no body and knows no model."""
