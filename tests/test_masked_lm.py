"""Truth: plain transformers and peft, on ESM2-like and BERT-like models of random weights."""

import json

import pytest
import torch
from twins import accepts, close, same

import scoreaction as sa
from scoreaction.cli import main
from scoreaction.recipes.build import build as build_recipe
from scoreaction.recipes.recipe import load_recipe

tiny_lm = pytest.importorskip("tiny_lm")
pytest.importorskip("transformers")
pytest.importorskip("peft")
from scoreaction.models import masked_lm  # noqa: E402

pytestmark = pytest.mark.slow
LETTERS = "ACDEFGHIKLMNPQRSTVWY"


def config(kind="esm", **changes):
    own = {"length": 6, "lora_rank": 2} | ({"alphabet": list(LETTERS)} if kind == "esm" else {"alphabet": None})
    return masked_lm.Config(path=str(tiny_lm.folder(kind)), **own | changes)


def moved(model):
    """The model with weights that are not its reference's."""
    with torch.no_grad():
        for parameter in model.parameters.values():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)))
    return model


def plain(lm, tokenizer, text):
    """Log probabilities of all tokens at all positions of a text, between begin and end, as transformers alone has them."""
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=True)["input_ids"]
    with torch.no_grad():
        return lm(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, 1:-1]


CASES = {
    "esm": ("AC<mask>DW<mask>", [0, 1, 20, 2, 18, 20], list(LETTERS)),
    "bert": ("the [MASK] cat sat [MASK] .", [0, 9, 4, 6, 9, 8], tiny_lm.BERT[5:]),
}


@pytest.mark.parametrize("kind", CASES)
def test_predictions_are_those_of_plain_transformers(kind):
    """Logits of the alphabet at the same text, normalised over it. Twins: another place, over the whole vocabulary."""
    text, tokens, letters = CASES[kind]
    model = masked_lm.build(config(kind))
    lm, tokenizer = masked_lm.load_lm(str(tiny_lm.folder(kind)))
    ids = tokenizer.convert_tokens_to_ids(letters)
    logits = plain(lm.eval(), tokenizer, text)
    truth = torch.log_softmax(logits[..., ids], -1)
    with torch.no_grad():
        found = model.predict(torch.tensor([tokens]), torch.tensor(0.5)).log_prob
    close(found, truth, atol=1e-5, shifted=truth.roll(1, 1), over_all=torch.log_softmax(logits, -1)[..., ids])
    same(model.process.vocabulary, len(letters), special_ones_too=len(tokenizer))
    same(tokenizer.decode(model.net.numbers[tokens]).replace(" ", ""), text.replace(" ", ""), first="A")


@pytest.mark.parametrize("kind", CASES)
def test_an_exported_adapter_loads_in_plain_peft(kind, tmp_path):
    """The policy's logits, by peft on the base. Twins: the base; the adapter at twice its scale."""
    from peft import PeftModel

    model = moved(masked_lm.build(config(kind, lora_alpha=3.0)))
    model.export(tmp_path)
    lm, tokenizer = masked_lm.load_lm(str(tiny_lm.folder(kind)))
    base = plain(lm.eval(), tokenizer, CASES[kind][0])
    tuned = plain(PeftModel.from_pretrained(lm, str(tmp_path)).eval(), tokenizer, CASES[kind][0])
    with torch.no_grad():
        own = model.net.lm(input_ids=tokenizer(CASES[kind][0], return_tensors="pt")["input_ids"]).logits[:, 1:-1]
    close(tuned, own, atol=1e-5, base=base, twice=base + 2 * (own - base))
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    same(
        (settings["r"], settings["lora_alpha"], set(settings["target_modules"])), (2, 3.0, {"query", "key", "value"}), swapped=0
    )


def test_without_lora_the_whole_model_is_exported(tmp_path):
    model = moved(masked_lm.build(config("bert", lora_rank=None)))
    model.export(tmp_path)
    lm, tokenizer = masked_lm.load_lm(str(tmp_path))
    base, _ = masked_lm.load_lm(str(tiny_lm.folder("bert")))
    text = CASES["bert"][0]
    close(plain(lm.eval(), tokenizer, text), plain(model.net.lm, tokenizer, text), atol=1e-6, base=plain(base, tokenizer, text))


def test_a_recipe_trains_it_and_is_saved(tmp_path):
    """A run through the command line; its model card names what loads it. Twin: untrained weights."""
    recipe = tmp_path / "recipe.yaml"
    (tmp_path / "letters.py").write_text(
        "from pydantic import BaseModel\n\n\nclass Config(BaseModel):\n    pass\n\n\n"
        "def build(config):\n    return lambda samples, prompts: (samples == 0).double().mean(1)\n"
    )
    recipe.write_text(
        f"model: {{name: masked_lm, path: {tiny_lm.folder('esm')}, length: 6, alphabet: {list(LETTERS)}}}\n"
        "reward: {name: token_scores, tokens: [1.0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]}\n"
        "algorithm: {name: dpok, beta: 0.2}\ntrain: {iterations: 3, batch: 16, lr: 0.01}\nevaluation: {n: 32}\n"
    )
    assert main(["train", str(recipe), "--output", str(tmp_path / "run")]) == 0
    saved = tmp_path / "run" / "model"
    assert (saved / "adapter_model.safetensors").is_file()
    loaded = sa.load(tmp_path / "run")
    tuner = build_recipe(load_recipe(str(recipe), []))
    same(loaded.parameters.keys(), tuner.model.parameters.keys(), none=())

    def changed(model):
        assert any(bool(p.abs().sum() > 0) for name, p in model.parameters.items() if "lora_B" in name)

    accepts(changed, loaded, untrained=tuner.model)


REFUSED = {
    "path: /nowhere cannot be loaded as a masked language model": {"path": "/nowhere"},
    "alphabet: '<cls>' is no token of": {"alphabet": ["A", "<cls>"]},
    "alphabet: 'Ä' is no token of": {"alphabet": ["A", "Ä"]},
    "length: .* has positions for 10 tokens between begin and end": {"kind": "bert", "length": 11},
    "lora_targets: 'quary' names no linear layer": {"lora_targets": ["quary"]},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_does_not_fit_is_refused_with_its_key(message):
    changes = dict(REFUSED[message])
    kind = changes.pop("kind", "esm")
    with pytest.raises(ValueError, match=f"^{message}"):
        masked_lm.build(config(kind).model_copy(update=changes))
    assert masked_lm.build(config(kind)).shape == (6,)
