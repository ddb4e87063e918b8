"""The one builder of models, for runs and all verbs: a named shape, a Hugging Face folder, or a user's callable."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from colrow.config_sections import ModelSection
from colrow.errors import ConfigError, first_line
from colrow.models.huggingface import UnsupportedModelError, json_mapping, read_config
from colrow.models.llama import Llama, LlamaConfig
from colrow.models.shapes import SHAPES, shape
from colrow.torch_compat import replaced

Weights = Literal["seeded", "folder", "built"]


@dataclass(frozen=True)
class Source:
    """A built model and where its weights come from.

    Args:
        model: on the meta device, unless `weights` is `built`.
        name: for messages.
        config: of colrow's own Llama; None for other models.
        weights: `seeded` from run.seed, read from a Hugging Face `folder`, or already there as `built`.
        auxiliary: the losses that the model returns beside its logits and that are trained, with their weights
            (`objective.auxiliary_weights`).
    """

    model: nn.Module
    name: str
    config: LlamaConfig | None
    weights: Weights
    folder: Path | None = None
    auxiliary: Mapping[str, float] = field(default_factory=dict)

    @property
    def exported_config(self) -> LlamaConfig | dict[str, Any] | None:
        """The source of an export's config.json; None for a model that no Hugging Face class computes."""
        config: Any = self.config or getattr(self.model, "config", None)
        if isinstance(config, LlamaConfig):
            return config
        to_dict = getattr(config, "to_dict", None)
        if to_dict is None:
            return None
        tree = dict(to_dict())
        if theirs := _class_of_transformers(self.model):
            tree["architectures"] = [theirs]
        if self.folder is not None:  # turned off for training, see `_of_transformers`
            tree["use_cache"] = _config_tree(self.folder).get("use_cache", True)
        return tree

    @property
    def vocab_size(self) -> int:
        """Size of the vocabulary that the model states.

        Raises:
            ConfigError: it states none.
        """
        size = getattr(getattr(self.model, "config", None), "vocab_size", None)
        if not isinstance(size, int):
            raise ConfigError(
                f"{self.name} has no config.vocab_size, by which the tokenizer is chosen: give the model an attribute "
                "`config` with it"
            )
        return size


def build_source(section: ModelSection, seed: int) -> Source:
    """The model that `section` names. A model of the user's own is imported with the working directory on the path.

    Raises:
        ConfigError: there is no such shape, folder or callable, or the callable returns no module.
    """
    if section.python is not None:
        return _from_python(section.python, seed)
    if section.huggingface is not None:
        return _from_huggingface(section, Path(section.huggingface))
    assert section.shape is not None
    config = shape(section.shape)
    if section.layers is not None:
        config = replace(config, num_hidden_layers=section.layers)
    return Source(_on_meta(config), section.shape, config, "seeded")


def parse_model(text: str, trust_code: bool = False) -> ModelSection:
    """The section for a MODEL argument: a named shape, a Hugging Face folder or config.json, `package.module:callable`.

    Raises:
        ConfigError: it is none of them.
    """
    if text in SHAPES:
        return ModelSection(shape=text)
    if Path(text).exists():
        return ModelSection(huggingface=text, trust_code=trust_code)
    if ":" in text:
        return ModelSection(python=text)
    raise ConfigError(
        f"no model is called {text!r}: give a named shape ({', '.join(SHAPES)}), a Hugging Face folder or config.json, "
        "or package.module:callable"
    )


def resolve_implementation(section: ModelSection) -> ModelSection:
    """`section` with `auto` replaced: `transformers` for a folder whose model colrow's Llama does not compute.

    A folder with trusted code of its own is built by that code, whatever family it names.
    """
    if section.implementation != "auto":
        return section
    implementation = "colrow"
    if section.huggingface is not None:
        try:
            read_config(section.huggingface)
        except UnsupportedModelError:
            implementation = "transformers"
        if section.trust_code and _own_code(_config_tree(Path(section.huggingface))):
            implementation = "transformers"
    return section.model_copy(update={"implementation": implementation})


def _from_huggingface(section: ModelSection, path: Path) -> Source:
    if section.layers is not None:
        raise ConfigError("model.layers is for a named shape: a Hugging Face folder has weights for all its layers")
    folder = path if path.is_dir() else path.parent
    if resolve_implementation(section).implementation == "transformers":
        return Source(_of_transformers(path, section.trust_code), str(path), None, "folder", folder)
    config = read_config(path)
    return Source(_on_meta(config), str(path), config, "folder", folder)


def _config_tree(path: Path) -> dict[str, Any]:
    """What config.json holds; nothing where it cannot be read, which is reported where the config is."""
    return json_mapping(path / "config.json" if path.is_dir() else path)


def _own_code(tree: dict[str, Any]) -> str | None:
    """The file of Python code that a config.json names for the model's class or its config's."""
    named = tree.get("auto_map")
    if not isinstance(named, dict) or not named:
        return None
    return str(named.get("AutoModelForCausalLM") or next(iter(named.values())))


def _of_transformers(path: Path, trust_code: bool) -> nn.Module:
    """The class of the transformers library that config.json names, its parameters on the meta device.

    Code of the folder's own runs only if `trust_code`: transformers asks on a terminal unless it is answered here.
    """
    try:
        from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise ConfigError(
            f"the model in {path} needs the transformers library ({error}): pip install 'colrow[transformers]'"
        ) from error
    if path.is_dir() and not (path / "config.json").exists():
        raise ConfigError(f"{path} holds no config.json: give a Hugging Face folder")
    tree = _config_tree(path)
    code = _own_code(tree)
    if code is not None and not trust_code and tree.get("model_type") not in CONFIG_MAPPING:
        raise ConfigError(
            f"the model in {path} is built by Python code of that folder ({code}), which runs only when asked for: "
            "read it, then set model.trust_code: true, or --trust-code"
        )
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_code)
        config.use_cache = False  # for generation; in training the cache is memory for nothing
        with parameters_on_meta():
            model: nn.Module = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, trust_remote_code=trust_code
            )
    except Exception as error:  # transformers, and code of others, raises many kinds for a model that it does not know
        reason = first_line(error)
        if "Unrecognized configuration class" in reason:
            reason = (
                f"{tree.get('model_type')} is no causal language model, the only kind that is read from a folder: "
                "build another in model.python, and train it by a loop of your own (docs/guide/library.md)"
            )
        raise ConfigError(f"transformers cannot build the model in {path}: {reason}") from error
    # on the meta device each name got a parameter of its own: those that are one come together again
    model.tie_weights()  # type: ignore[operator]
    return model.train()


def _class_of_transformers(model: nn.Module) -> str | None:
    """The class that transformers computes the model with; FSDP2 and users make subclasses of it."""
    theirs = (cls for cls in type(model).__mro__ if cls.__module__.startswith("transformers.models."))
    return next((cls.__name__ for cls in theirs), None)


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Within, parameters lose their memory as they are registered. Buffers keep theirs: nothing would fill them."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None:
            param = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
        register(module, name, param)

    with replaced(nn.Module, register_parameter=register_on_meta):
        yield


def imported(path: str, kind: str) -> Any:
    """The object at `package.module:name`, with the working directory on the path; `kind` names it in errors.

    Raises:
        ConfigError: there is none.
    """
    module_name, _, attribute = path.partition(":")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except ImportError as error:
        raise ConfigError(f"{kind} {path}: {error}: check the name, or put its folder on PYTHONPATH") from error
    except (AttributeError, ValueError) as error:
        raise ConfigError(
            f"{kind} {path}: {error}: write package.module:callable, such as mymodels.small:build"
        ) from error


def imported_callable(path: str, kind: str) -> Callable[[], Any]:
    """`imported`, of what can be called without arguments.

    Raises:
        ConfigError: there is none.
    """
    found = imported(path, kind)
    if not callable(found):
        raise ConfigError(f"{kind} {path} is a {type(found).__name__}: name a callable")
    if (missing := _missing_arguments(found)) is not None:
        raise ConfigError(f"{kind} {path} cannot be called without arguments: {missing}")
    return found


def built(path: str, seed: int) -> nn.Module:
    """What the user's callable at `package.module:callable` returns.

    Raises:
        ConfigError: there is none, or it returns no module.
    """
    build = imported_callable(path, "model")
    torch.manual_seed(seed)
    model = build()
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model {path} returns a {type(model).__name__}: it must return an nn.Module")
    return model


def _missing_arguments(build: Callable[..., object]) -> str | None:
    try:
        inspect.signature(build).bind()
    except TypeError as error:
        return str(error)
    except ValueError:  # a callable written in C may have no signature
        return None
    return None


def _from_python(path: str, seed: int) -> Source:
    model = built(path, seed)
    config = getattr(model, "config", None)
    return Source(model, path, config if isinstance(config, LlamaConfig) else None, "built")


def _on_meta(config: LlamaConfig) -> Llama:
    try:
        with torch.device("meta"):
            return Llama(config)
    except RuntimeError as error:  # torch counts a tensor's bytes in 64 bits
        raise ConfigError(f"the model's sizes are too large: {first_line(error)}") from error
