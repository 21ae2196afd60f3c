"""Models with the modeling file that their checkpoints carry, known to transformers without it.

transformers takes seconds to import, so its table of configs is added to when it is imported for
another reason, and the classes of a family are made when a checkpoint asks for them.
"""

import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

MODELING = "modeling_gqa"
PREFIX = "GQA"

FAMILIES = (
    "bart", "bert", "blenderbot", "blenderbot-small", "camembert", "electra", "gpt2", "m2m_100",
    "marian", "mbart", "mt5", "opt", "pegasus", "plbart", "roberta", "t5", "whisper",
    "xlm-roberta",
)  # fmt: skip
"""transformers' model types for which the file has attention."""

# transformers' Auto classes and its tables of model classes by model type; the first that has a family
# says which class a config without `architectures` means.
_TABLES = {
    "AutoModelForSeq2SeqLM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForSpeechSeq2Seq": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "AutoModelForMaskedLM": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "AutoModel": "MODEL_MAPPING_NAMES",
    "AutoModelForPreTraining": "MODEL_FOR_PRETRAINING_MAPPING_NAMES",
    "AutoModelForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForTokenClassification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForQuestionAnswering": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
    "AutoModelForMultipleChoice": "MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES",
    "AutoModelForNextSentencePrediction": "MODEL_FOR_NEXT_SENTENCE_PREDICTION_MAPPING_NAMES",
    "AutoModelForAudioClassification": "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForImageTextToText": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "AutoModelForTextEncoding": "MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES",
}
_CONFIGS = "transformers.models.auto.configuration_auto"
_MODELS = "transformers.models.auto.modeling_auto"


def modeling_file() -> Path:
    """The file that checkpoints carry."""
    return Path(__file__).with_name(f"{MODELING}.py")


def find_class(name: str) -> Any:
    """Find a class of the modeling file by name, such as `GQAT5Config`; None if it has none."""
    module = importlib.import_module(f"{__name__}.{MODELING}")
    return getattr(module, name, None) if name.startswith(PREFIX) else None


def auto_classes(model_type: str) -> dict[str, str]:
    """Map transformers' Auto classes to the class of the modeling file for a stock model type."""
    tables = importlib.import_module(_MODELS)
    configs = importlib.import_module(_CONFIGS).CONFIG_MAPPING_NAMES
    found = {"AutoConfig": PREFIX + configs[model_type]}
    for auto, table in _TABLES.items():
        name = getattr(tables, table, {}).get(model_type)
        if name is not None:
            found[auto] = PREFIX + (name if isinstance(name, str) else name[0])
    return found


def loading_class(config: Mapping[str, Any]) -> str:
    """Name the Auto class that loads the class which a `config.json` states, else the one of a causal model."""
    stated = config.get("architectures") or [None]
    named = {
        auto: str(path).rpartition(".")[2] for auto, path in config.get("auto_map", {}).items()
    }
    tables = importlib.import_module(_MODELS)
    for auto, table in _TABLES.items():
        known = named.get(auto) or getattr(tables, table, {}).get(config["model_type"], ())
        if stated[0] in ((known,) if isinstance(known, str) else known):
            return auto
    return "AutoModelForCausalLM"


def install() -> None:
    """Have transformers know the models: at once if it is imported, else as soon as it is."""
    if _CONFIGS in sys.modules:
        _register_families(sys.modules[_CONFIGS])
    else:
        sys.meta_path.insert(0, _AfterImport(_CONFIGS, _register_families))


class _AfterImport(MetaPathFinder):
    """Calls a function when a module has been imported, and leaves the importing to others."""

    def __init__(self, name: str, call: Callable[[ModuleType], None]) -> None:
        self._name, self._call = name, call

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self._name:
            return None
        sys.meta_path.remove(self)  # first, as this looks through all finders again
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_call(module: ModuleType) -> None:
            execute(module)
            self._call(module)

        spec.loader.exec_module = execute_and_call  # type: ignore[method-assign]
        return spec


class _OnDemand:
    """Stands for a config class until it is used; then its models are made known, too."""

    def __init__(self, family: str) -> None:
        self._family = family

    def __getattr__(self, attribute: str) -> Any:
        return getattr(_register_classes(self._family), attribute)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _register_classes(self._family)(*args, **kwargs)


def _register_families(module: ModuleType) -> None:
    # No class is made here: transformers' modules import one another while they are imported.
    for family in FAMILIES:
        module.CONFIG_MAPPING.register(f"gqa_{family}", _OnDemand(family), exist_ok=True)


def _register_classes(family: str) -> Any:
    auto, names = importlib.import_module("transformers"), auto_classes(family)
    config_class = find_class(names.pop("AutoConfig"))
    auto.AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    for name, model in names.items():
        getattr(auto, name).register(config_class, find_class(model), exist_ok=True)
    return config_class
