"""The images and compose.yml on a real container engine: `make container-test`, skipped where none answers.

The engine must see the folder for temporary files (TMPDIR) under the same path, and the ports that it publishes must
answer on this machine's 127.0.0.1; for an engine in a network namespace of its own run all of it in there (`nsenter
--net=FILE make container-test`). Ports 8000 and 3000 must be free. PIP_CONF, CA_BUNDLE, PIP_EXTRA_INDEX_URL and
SERVER_FILES mean what they mean in deploy/.env.example.
"""
