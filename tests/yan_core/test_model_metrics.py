"""BERTScore and perplexity by tiny random models in a local folder."""

import math
import shutil

import pytest
import torch
from safetensors.torch import load_file

from yan_core.model_metrics import BertScore, Perplexity

transformers = pytest.importorskip("transformers", reason="needs the extra baselines")

WORDS = ["<pad>", "<s>", "[UNK]", *"the cat dog sat on a mat ran far away".split()]


def save_tokenizer(folder, **special) -> None:
    import tokenizers

    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]")
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    if special.get("post"):
        backend.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", unk_token="[UNK]", bos_token="<s>", model_max_length=16
    )
    made.save_pretrained(folder)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
    )
    transformers.BertModel(config).save_pretrained(folder)
    save_tokenizer(folder, post=True)
    return folder


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=len(WORDS), n_embd=16, n_layer=1, n_head=2, n_positions=16)
    model = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def test_bertscore_of_equal_texts_is_1_of_others_less_and_the_best_reference_counts(encoder) -> None:
    bert_score = BertScore(encoder)
    answers = ["the cat sat on a mat", "the cat", "", "dog " * 40]
    found = bert_score(answers, [["the dog", "the cat sat on a mat"], ["a dog ran"], ["the cat"], ["dog " * 40]])
    assert found.rows[0] == pytest.approx(1, abs=1e-5) and found.rows[1] < 0.99
    assert found.rows[2] == 0  # no token
    assert found.rows[3] == pytest.approx(1, abs=1e-5)  # cut at the longest length


def test_bertscore_of_a_worked_example_in_any_company(encoder) -> None:
    alone = BertScore(encoder)(["the cat ran"], [["a dog"]]).rows[0]
    among = BertScore(encoder)(["the cat ran", "a mat far away on the mat"], [["a dog"], ["a"]]).rows[0]
    model = transformers.BertModel.from_pretrained(encoder).eval()

    def vectors(text: str) -> torch.Tensor:
        ids = torch.tensor([[1] + [WORDS.index(w) for w in text.split()]])
        with torch.no_grad():
            return torch.nn.functional.normalize(model(ids).last_hidden_state[0, 1:], dim=-1)

    similarity = vectors("the cat ran") @ vectors("a dog").T
    precision, recall = similarity.max(1).values.mean(), similarity.max(0).values.mean()
    assert alone == pytest.approx(float(2 * precision * recall / (precision + recall)), abs=1e-5)
    assert among == pytest.approx(alone, abs=1e-5)


def test_perplexity_counts_the_answers_tokens_alone(language_model) -> None:
    found = Perplexity(language_model)(["the cat", "", "a"], ["sat on", "dog ran", " "])
    assert found.statistics[:, 1].tolist() == [2, 2, 0]
    model = transformers.GPT2LMHeadModel.from_pretrained(language_model).eval()
    ids = torch.tensor([[1] + [WORDS.index(w) for w in "the cat sat on".split()]])
    with torch.no_grad():
        log_probs = model(ids).logits[0].log_softmax(-1)
    expected = -(log_probs[2, ids[0, 3]] + log_probs[3, ids[0, 4]]) / 2
    assert math.log(found.rows[0]) == pytest.approx(float(expected), rel=1e-4)
    assert math.log(found.value) == pytest.approx(found.statistics[:, 0].sum() / 4)


def test_a_context_that_is_too_long_loses_its_beginning(language_model) -> None:
    found = Perplexity(language_model)(["the " * 50], ["cat sat"])
    assert found.statistics[0, 1] == 2 and math.isfinite(found.value)


@pytest.mark.parametrize("metric", [BertScore, Perplexity])
def test_a_folder_without_a_model_is_refused(tmp_path, metric) -> None:
    with pytest.raises(ValueError, match="no model at .*config.json"):
        metric(tmp_path)


def test_pickled_weights_are_not_read(tmp_path, language_model, monkeypatch) -> None:
    """A folder of old with a pickle in it, which is not even opened."""
    folder = shutil.copytree(language_model, tmp_path / "old")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("a pickle was opened"))
    with pytest.raises(ValueError, match="old holds no weights in safetensors: save the model anew"):
        Perplexity(folder)


def test_where_no_answer_has_a_word_there_is_no_perplexity(language_model) -> None:
    assert math.isnan(Perplexity(language_model)(["the cat", ""], ["", " "]).value)
