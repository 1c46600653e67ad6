"""The optional parts of the package, and how somebody who lacks one gets it."""


def missing_extra(what: str, extra: str) -> str:
    """Why `what` does not work, and what to do. The package is installed from a checkout, not from an index."""
    return (
        f"{what} needs the extra `{extra}`. Where the checkout or the sdist is: "
        f"pip install -c constraints.txt '.[{extra}]' (pipx and uv: docs/operations.md, Install)"
    )
