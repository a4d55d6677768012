"""Which vLLM releases this package was tested with."""

from vllm_vispec.utils.logs import get_logger

logger = get_logger(__name__)

MIN_VERSION, MAX_VERSION = (0, 32), (0, 33)


def installed_version() -> str:
    """Return vLLM's version, e.g. ``0.33.0``."""
    from vllm.version import __version__

    return str(__version__)


def version_problem(version: str) -> str | None:
    """Refuse a vLLM that is too old, warn about one that is too new."""
    try:
        major, minor = (int(part) for part in version.split(".")[:2])
    except ValueError:
        logger.warning(
            "ViSpec: cannot read vLLM's version %r; only patch points are checked", version
        )
        return None
    if (major, minor) < MIN_VERSION:
        return f"vLLM {version} is too old; install vLLM {supported_range()}"
    if (major, minor) > MAX_VERSION:
        logger.warning(
            "ViSpec was tested with vLLM %s, this is %s; its patch points are checked when used",
            supported_range(),
            version,
        )
    return None


def supported_range() -> str:
    """Return the vLLM versions this release was tested with, e.g. ``0.32 to 0.33``."""
    low, high = (".".join(map(str, version)) for version in (MIN_VERSION, MAX_VERSION))
    return f"{low} to {high}"
