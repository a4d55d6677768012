"""One entry of the table of places where ViSpec touches vLLM."""

from dataclasses import dataclass

VERSIONS = ("0.32", "0.33")


@dataclass(frozen=True)
class PatchPoint:
    """One thing in vLLM that ViSpec calls, overrides or reads.

    Attributes:
        module: Dotted module, e.g. ``vllm.engine.arg_utils``.
        symbol: ``name``, ``Class``, ``Class.method`` or, with ``self.`` inside, an attribute that
            the class must set.
        parameters: Parameters that must exist, in this order, ``self`` left out.  Others may
            follow or stand between.
        use: ``wraps``, ``overrides``, ``subclasses``, ``calls`` or ``reads``.
        reason: Why it is touched.
        versions: vLLM releases it was verified on.
    """

    module: str
    symbol: str
    parameters: tuple[str, ...]
    use: str
    reason: str
    versions: tuple[str, ...] = VERSIONS

    @property
    def name(self) -> str:
        """``module:symbol``, as shown to users."""
        return f"{self.module}:{self.symbol}"
