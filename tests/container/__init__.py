"""The images and compose.yml on a real container engine: `make container-test`, skipped where none answers."""
