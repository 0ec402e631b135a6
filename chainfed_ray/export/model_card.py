"""The model card of a finished model: what it is, how to load it, and how good it was, in the Hugging Face hub's form."""

import json
from pathlib import Path
from textwrap import dedent
from typing import Any

import yaml

from chainfed_ray.errors import CorruptCommit
from chainfed_ray.model.saved_stack import SavedStack
from chainfed_ray.reading import NF4

_NAMED = 100  # classes; a card of more says how many there are
_RESULTS = {"accuracy": "accuracy", "loss": "loss", "rounds": "rounds", "epsilon": "ε (differential privacy)"}
_FURTHER = {"macro_f1": "macro-F1", "perplexity": "perplexity", "choice_accuracy": "accuracy of the multiple choice"}


def model_card(saved: SavedStack, form: str, folder: Path, licence: str | None = None, training: str = "") -> str:
    """The README.md of ``saved`` in the format ``form``, with the scores of its job if its record is beside ``folder``.

    ``licence`` is that of the base model, if it is known. ``training`` says how the stack was trained, in sections.

    Raises:
        CorruptCommit: the record cannot be read.
    """
    about = {
        "base_model": _base_name(saved.base),
        **({"license": licence} if licence else {}),
        "library_name": form,
        "pipeline_tag": "text-classification" if saved.classes else "text-generation",
        "tags": ["chainfed-ray", "adapters", "federated-learning"],
    }
    parts = [
        f"---\n{yaml.safe_dump(about, sort_keys=False)}---",
        f"# {_base_name(saved.base)}, fine-tuned with chainfed-ray",
        _what(saved),
        f"## How to load it\n\n{_needs(saved, form)}\n\n```python\n{_code(saved, form)}```",
        training,
        _scores(folder),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _base_name(base: str) -> str:
    """The base model's name on the hub, or that of its folder or file, without the path to it."""
    scheme, _, name = base.removesuffix(NF4).partition(":")
    return name.partition("@")[0] if scheme == "hf" else Path(name).name


def _what(saved: SavedStack) -> str:
    layers = ", ".join(map(str, saved.stack.layers))
    if saved.stack.is_lora:
        rank = saved.config()["r"]
        trained = (
            f"Its clients trained a LoRA of rank {rank} at most inside each of the layers {layers}, counted from 0."
        )
    else:
        size = saved.config()["bottleneck"]
        trained = (
            f"Its clients trained an adapter of {size} units after each of the layers {layers}, counted from 0. "
            "The base model's own weights are as they were."
        )
    if not saved.classes:
        return f"A language model. {trained}"
    named = "\n".join(f"- `{name}`" for name in saved.classes[:_NAMED])
    more = f"\n- … {len(saved.classes)} in all" if len(saved.classes) > _NAMED else ""
    return (
        f"A classifier of texts of up to {saved.max_length} tokens; longer ones are cut. {trained}\n\n"
        f"Its classes:\n\n{named}{more}"
    )


def _scores(folder: Path) -> str:
    """The job's scores on its test rows. They are of its model, not of the other stacks that it may have left."""
    record = folder.resolve().parent / "finished.json"
    if folder.resolve().name != "model" or not record.exists():
        return ""
    try:
        document = json.loads(record.read_text(encoding="utf-8"))
        found = [(words, document[name]) for name, words in _RESULTS.items() if document.get(name) is not None]
        evaluation = document.get("evaluation") or {}
        found += [(words, evaluation[name]) for name, words in _FURTHER.items() if evaluation.get(name) is not None]
    except (OSError, ValueError, AttributeError) as error:
        raise CorruptCommit(str(record), f"it is no record of a job ({type(error).__name__}: {error})") from None
    rows = "\n".join(f"| {words} | {_number(value)} |" for words, value in found)
    return f"## Results\n\nOf the whole model, on the test rows of its job.\n\n| | |\n|---|---|\n{rows}"


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


_NEEDS = {
    "peft": "It is an adapter: the base model is loaded beside it. It needs chainfed-ray, whose import registers the method.",
    "transformers": "All weights are in this folder. It needs chainfed-ray, whose import registers the model.",
    "onnx": "The graph has all weights, in float32. It needs onnxruntime, and transformers for the tokenizer.",
}


def _needs(saved: SavedStack, form: str) -> str:
    if not saved.stack.is_lora or (saved.classes and form != "peft"):
        return _NEEDS[form]
    finds = " Below, chainfed-ray finds the base model." if form == "peft" and _is_ours_to_find(saved) else ""
    beside = " The head is beside it, in head.safetensors." if saved.classes else ""
    return _LORA_NEEDS[form] + beside + finds


def _is_ours_to_find(saved: SavedStack) -> bool:
    """True if transformers alone cannot load the base model: it comes with a package, as a GGUF file, or in NF4."""
    return saved.base.startswith("builtin:") or saved.base.endswith((".gguf", NF4))


_LORA_NEEDS = {
    "peft": "It is a plain LoRA: whatever loads PEFT's LoRAs loads it beside the base model. It does not need chainfed-ray.",
    "transformers": "The LoRA is in the weights, which are all in this folder. It does not need chainfed-ray.",
}


def _code(saved: SavedStack, form: str) -> str:
    """The code of the card. ``FOLDER`` is for the reader to set."""
    plain = saved.stack.is_lora and not (form == "peft" and _is_ours_to_find(saved))
    if saved.stack.is_lora and saved.classes and form == "peft":
        code = (_PLAIN_BASE if plain else _OUR_BASE) + _LORA_CLASSIFIER
    else:
        code = _LORA_CODE[form] if plain and not saved.classes else _CODE[form, bool(saved.classes)]
    base = saved.config()["base_model_name_or_path"] or saved.base
    code = dedent(code).lstrip().replace("BASE", repr(saved.base)).replace("PATH", base)
    code = code.replace("REVISION", f', revision="{saved.revision}"' if saved.revision else "")
    code = code.replace("LAYERS", repr(f"base_model.model.{saved.layers_path}"))
    return 'FOLDER = "."  # where this file is\n\n' + code


_LORA_CODE = {
    "peft": """
        from peft import PeftModel
        from transformers import AutoModelForCausalLM, AutoTokenizer

        base = "PATH"  # the base model's name on the hub, or its folder
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(baseREVISION), FOLDER)
        words = AutoTokenizer.from_pretrained(baseREVISION)
        written = model.generate(**words("Once", return_tensors="pt"), max_new_tokens=40)
        print(words.decode(written[0]))
        """,
    "transformers": """
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(FOLDER)
        words = AutoTokenizer.from_pretrained(FOLDER)
        written = model.generate(**words("Once", return_tensors="pt"), max_new_tokens=40)
        print(words.decode(written[0]))
        """,
}
_PLAIN_BASE = """
        from transformers import AutoModel, AutoTokenizer

        base = "PATH"  # the base model's name on the hub, or its folder
        whole, words = AutoModel.from_pretrained(baseREVISION), AutoTokenizer.from_pretrained(baseREVISION)
"""
_OUR_BASE = """
        from chainfed_ray.hub import tokenizer
        from chainfed_ray.model.source import load_whole, weights_folder
        from transformers import AutoModel

        folder = weights_folder(BASE)
        whole, words = load_whole(AutoModel, folder), tokenizer(BASE, folder)
"""
# The head takes the outputs of the layers, which is not what every model hands out: many have a norm after the last one.
_LORA_CLASSIFIER = """
        import json
        from pathlib import Path

        import torch
        from peft import PeftModel
        from safetensors.torch import load_file
        from torch.nn.functional import layer_norm, linear

        model = PeftModel.from_pretrained(whole, FOLDER).eval()
        reader = whole.get_encoder() if whole.config.is_encoder_decoder else whole  # with the LoRA inside
        own = json.loads((Path(FOLDER) / "chainfed.json").read_text())
        head, outputs = load_file(Path(FOLDER) / "head.safetensors"), []
        for layer in model.get_submodule(LAYERS)[-own["head_layers"] :]:
            layer.register_forward_hook(lambda _layer, _inputs, out: outputs.append(out if torch.is_tensor(out) else out[0]))
        batch = words(["A text."], return_tensors="pt", padding=True, truncation=True, max_length=own["max_length"])
        with torch.no_grad():
            reader(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        mask = batch["attention_mask"].unsqueeze(-1)
        pooled = torch.stack([(output * mask).sum(1) / mask.sum(1) for output in outputs], dim=1)
        features = layer_norm(pooled, pooled.shape[-1:], head["norm.weight"], head["norm.bias"]).flatten(1)
        logits = linear(features, head["linear.weight"], head["linear.bias"])
        print(own["classes"][logits[0].argmax()])
"""
_CODE = {
    ("peft", True): """
        from peft import PeftModel
        from chainfed_ray.hub import tokenizer
        from chainfed_ray.model.source import weights_folder
        from chainfed_ray.serving.peft_method import SequenceClassifier

        base = BASE
        model = PeftModel.from_pretrained(SequenceClassifier.from_folder(weights_folder(base)), FOLDER)
        config = model.peft_config["default"]
        words = tokenizer(base, weights_folder(base))
        batch = words(["A text."], return_tensors="pt", padding=True, truncation=True, max_length=config.max_length)
        logits = model(batch["input_ids"], batch["attention_mask"])
        print(config.classes[logits[0].argmax()])
        """,
    ("peft", False): """
        import chainfed_ray.serving.peft_method
        from chainfed_ray.hub import tokenizer
        from chainfed_ray.model.source import load_whole, weights_folder
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        base = BASE
        model = PeftModel.from_pretrained(load_whole(AutoModelForCausalLM, weights_folder(base)), FOLDER)
        words = tokenizer(base, weights_folder(base))
        written = model.generate(**words("Once", return_tensors="pt"), max_new_tokens=40)
        print(words.decode(written[0]))
        """,
    ("transformers", True): """
        import chainfed_ray.export
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        model = AutoModelForSequenceClassification.from_pretrained(FOLDER)
        words = AutoTokenizer.from_pretrained(FOLDER)
        batch = words(["A text."], return_tensors="pt", padding=True, truncation=True)
        logits = model(**batch).logits
        print(model.config.id2label[int(logits[0].argmax())])
        """,
    ("transformers", False): """
        import chainfed_ray.export
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(FOLDER)
        words = AutoTokenizer.from_pretrained(FOLDER)
        written = model.generate(**words("Once", return_tensors="pt"), max_new_tokens=40)
        print(words.decode(written[0]))
        """,
    ("onnx", True): """
        import json
        from pathlib import Path

        import onnxruntime
        from transformers import AutoTokenizer

        words = AutoTokenizer.from_pretrained(FOLDER)
        labels = json.loads((Path(FOLDER) / "labels.json").read_text())
        session = onnxruntime.InferenceSession(str(Path(FOLDER) / "model.onnx"))
        batch = words(["A text."], return_tensors="np", padding=True, truncation=True)
        (logits,) = session.run(["logits"], {name: batch[name] for name in ("input_ids", "attention_mask")})
        print(labels[logits[0].argmax()])
        """,
}
