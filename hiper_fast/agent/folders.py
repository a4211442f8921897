"""What a model's folder may not be, said before anything in it is loaded."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

from hiper_fast.options import ConfigError

ADAPTER = "adapter_config.json"
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
OWN_CODE = (
    "it needs code of its own, and none is run; use a model whose architecture transformers has"
)
NO_SAFETENSORS = "it has no weights in safetensors, and pickled ones are not opened; convert them"


def check_folder(path: str) -> None:
    """ConfigError for a folder of pickled weights, and for adapters without their base; a hub id passes."""
    folder = Path(path)
    if not folder.is_dir():
        return
    pickled = [file.name for pattern in PICKLED for file in sorted(folder.glob(pattern))]
    pickled = [name for name in pickled if name != "training_args.bin"]
    if pickled and not any(folder.glob("*.safetensors")):
        raise ConfigError(
            f"model.path: {path} has pickled weights only ({pickled[0]}), which can run code when they are "
            "opened; where you trust them, load them with transformers and save_pretrained them as safetensors"
        )
    config = folder / "config.json"
    if config.exists():
        check_type(config)
    elif (folder / ADAPTER).exists():
        check_base(path, folder / ADAPTER)


def check_type(file: Path) -> None:
    """ConfigError without a model_type: transformers would guess one from the folder's name, at its full size."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        model_type = found.get("model_type") if isinstance(found, dict) else None
    except (ValueError, OSError) as error:
        raise ConfigError(f"model.path: {file} cannot be read ({error})") from error
    if not isinstance(model_type, str) or not model_type:
        raise ConfigError(
            f"model.path: {file} names no model_type; it is not a model's config.json"
        )


def check_base(path: str, file: Path) -> None:
    """ConfigError where the adapters' base is gone, or is a folder that may not be."""
    try:
        base = json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"]
        is_there = Path(base).exists()
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ConfigError(
            f"model.path: {file} names no base model ({error}); save the adapters again"
        ) from error
    if Path(base).is_absolute() and not is_there:
        raise ConfigError(
            f"model.path: the base model of the adapters in {path} is no longer at {base}; move it back, or "
            f"write where it is as base_model_name_or_path into {file}"
        )
    check_folder(base)


def explain(error: Exception) -> str:
    """Why transformers did not load a model, in one line, in our words where its own are a wrong turn."""
    said = str(error) or type(error).__name__
    if "trust_remote_code" in said:
        return OWN_CODE
    if "use_safetensors" in said:
        return NO_SAFETENSORS
    return textwrap.shorten(said, 300)
