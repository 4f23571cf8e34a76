"""Conditions: the published sentences and windows, both encoders, and the random forgetting of the training."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from LCTfoundLib.errors import WeightError
from LCTfoundLib.networks.backbone import EMBEDDING_SIZE
from LCTfoundLib.networks.conditions import (
    FREEDOM,
    LUNG,
    MEDIASTINUM,
    BertEncoder,
    BuiltInEncoder,
    Condition,
    ConditionError,
    Disease,
    Language,
    Scaling,
    Window,
    drop_condition,
    neighboring_slices,
    slice_input,
)


class TestSentence:
    def test_the_published_ones(self):
        assert Condition(LUNG).sentence() == "window width and window level is 1500 and -500."
        assert Condition(MEDIASTINUM).sentence() == "window width and window level is 400 and 0."
        assert FREEDOM.sentence() == "freedom."
        assert (
            Condition(LUNG, (Disease.EMPHYSEMA,)).sentence(Language.ENGLISH)
            == "window width and window level is 1500 and -500.this image may related to emphysema"
        )
        assert Condition(MEDIASTINUM, (Disease.MEDIASTINAL_MASS,)).sentence().endswith("related to 纵隔肿瘤")

    def test_several_diseases_and_fractions(self):
        condition = Condition(Window(1200.5, -600.0), (Disease.CAVITY, Disease.BULLAE))
        assert condition.sentence(Language.ENGLISH) == (
            "window width and window level is 1200.5 and -600.this image may related to cavity,bullae"
        )

    def test_every_disease_has_a_term_of_its_own_in_both_languages(self):
        assert len(Disease) == 14
        for language in Language:
            assert len({disease.term(language) for disease in Disease}) == 14

    def test_diseases_without_a_window_are_refused(self):
        with pytest.raises(ConditionError, match="needs a window"):
            Condition(None, (Disease.CAVITY,))

    @pytest.mark.parametrize("window", [(0, 0), (-5, 0), (float("nan"), 0), (100, float("inf"))])
    def test_windows_that_are_none_are_refused(self, window):
        with pytest.raises(ConditionError, match="width > 0"):
            Window(*window)


class TestInput:
    def test_ends_and_middle_of_the_published_windows(self):
        hu = torch.tensor([-3000.0, -1250, -500, 250, 3000])
        assert LUNG.apply(hu).tolist() == [0, 0, 0.5, 1, 1]
        hu = torch.tensor([-3000, -200, 0, 100, 200, 3000], dtype=torch.int16)
        assert MEDIASTINUM.apply(hu).tolist() == [0, 0, 0.5, 0.75, 1, 1]

    def test_a_slice_is_stretched_from_its_darkest_to_its_brightest_pixel(self, rng):
        hu = rng.integers(-1100, 400, (3, 9, 7)).astype(np.int16)
        x = slice_input(torch.from_numpy(hu), LUNG)
        assert x.shape == (3, 3, 9, 7) and x.dtype == torch.float32
        for one, result in zip(hu.astype(np.float64), x.numpy(), strict=True):
            shown = (np.clip(one, -1250, 250) + 1250) / 1500
            expected = ((shown - shown.min()) / (shown.max() - shown.min()) - 0.5) / 0.5
            for channel in result:
                np.testing.assert_allclose(channel, expected, atol=1e-6)
        assert x.amin(dim=(1, 2, 3)).tolist() == [-1, -1, -1]
        torch.testing.assert_close(x.amax(dim=(1, 2, 3)), torch.ones(3))

    def test_the_windows_own_ends_keep_the_meaning_of_a_gray_value(self):
        hu = torch.tensor([[[-500.0, -125.0]], [[-500.0, 250.0]]])
        x = slice_input(hu, LUNG, Scaling.WINDOW)
        torch.testing.assert_close(x[:, 0, 0], torch.tensor([[0.0, 0.5], [0.0, 1.0]]))

    @pytest.mark.parametrize("scaling", Scaling)
    def test_a_slice_of_one_value_stays_finite(self, scaling):
        x = slice_input(torch.full((1, 4, 4), -1000), MEDIASTINUM, scaling)
        assert torch.equal(x, torch.full((1, 3, 4, 4), -1.0))

    def test_neighbors_are_the_slices_below_and_above(self, rng):
        hu = torch.from_numpy(rng.integers(-200, 200, (5, 4, 4)).astype(np.int16))
        x = neighboring_slices(hu, MEDIASTINUM)
        for k in range(5):
            for channel, step in enumerate((-1, 0, 1)):
                neighbor = hu[min(max(k + step, 0), 4)].float()
                torch.testing.assert_close(x[k, channel], neighbor / 200)

    def test_one_slice_is_its_own_neighbor(self):
        hu = torch.randint(-200, 200, (1, 4, 4))
        assert torch.equal(neighboring_slices(hu, MEDIASTINUM), slice_input(hu, MEDIASTINUM, Scaling.WINDOW))


class TestDropping:
    CONDITION = Condition(LUNG, (Disease.FIBROSIS, Disease.CAVITY))

    def test_shares_are_the_published_ones(self):
        generator = torch.Generator().manual_seed(int(torch.randint(0, 2**31, ())))
        n = 20_000
        counts = Counter(drop_condition(self.CONDITION, generator) for _ in range(n))
        assert set(counts) == {FREEDOM, Condition(LUNG), self.CONDITION}
        for condition, share in ((FREEDOM, 0.05), (Condition(LUNG), 0.475), (self.CONDITION, 0.475)):
            # Six standard deviations: fails by chance once in 5e8 runs; 0.05 against 0.06 is 6.5 of them.
            assert abs(counts[condition] - n * share) < 6 * math.sqrt(n * share * (1 - share))

    def test_the_generator_alone_decides(self):
        def draw(seed: int) -> list[Condition]:
            generator = torch.Generator().manual_seed(seed)
            return [drop_condition(self.CONDITION, generator) for _ in range(50)]

        torch.manual_seed(1)
        first = draw(5)
        torch.manual_seed(2)
        assert draw(5) == first != draw(6)

    def test_a_condition_without_diseases_takes_as_much_of_the_generator(self):
        one, other = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
        drop_condition(self.CONDITION, one)
        drop_condition(Condition(LUNG), other)
        assert torch.equal(one.get_state(), other.get_state())


class TestBuiltInEncoder:
    def test_every_condition_has_a_vector_of_its_own(self):
        conditions = [FREEDOM, Condition(LUNG), Condition(MEDIASTINUM)]
        conditions += [Condition(window, (disease,)) for window in (LUNG, MEDIASTINUM) for disease in Disease]
        vectors = BuiltInEncoder().encode(conditions)
        assert vectors.shape == (31, 1, EMBEDDING_SIZE) and vectors.dtype == torch.float32
        distances = torch.cdist(vectors[:, 0], vectors[:, 0]) + 1e9 * torch.eye(31)
        assert distances.min() > 1

    def test_neighboring_windows_are_near(self):
        a, b, c = BuiltInEncoder().encode(
            [Condition(Window(1500, -500)), Condition(Window(1501, -500)), Condition(LUNG)]
        )
        assert torch.equal(a, c) and 0 < (a - b).norm() < 0.2 * a.norm()

    def test_several_diseases_are_averaged_in_any_order(self):
        encoder = BuiltInEncoder()
        pair, turned, first, second = encoder.encode(
            [
                Condition(LUNG, diseases)
                for diseases in (
                    (Disease.CAVITY, Disease.BULLAE),
                    (Disease.BULLAE, Disease.CAVITY),
                    (Disease.CAVITY,),
                    (Disease.BULLAE,),
                )
            ]
        )
        torch.testing.assert_close(pair, turned)
        torch.testing.assert_close(pair, (first + second) / 2)

    def test_it_learns_and_comes_back_from_its_weights(self):
        encoder, other = BuiltInEncoder(), BuiltInEncoder()
        conditions = [FREEDOM, Condition(LUNG), Condition(LUNG, (Disease.RIB_FRACTURE,))]
        encoder(conditions).square().sum().backward()
        assert encoder.freedom.grad is not None and encoder.freedom.grad.abs().sum() > 0
        rows = encoder.diseases.weight.grad.abs().sum(dim=1) > 0
        assert rows.nonzero().flatten().tolist() == [0, 14]
        assert sum(p.numel() for p in encoder.parameters()) == 4608
        other.load_state_dict(encoder.state_dict())
        assert torch.equal(other.encode(conditions), encoder.encode(conditions))


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    """A BERT of one small layer, in the layout of a real one."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("bert")
    words = "window width and level is this image may related to freedom . - , 1500 500 400 0 emphysema".split()
    characters = sorted({c for disease in Disease for c in disease.term(Language.CHINESE)})
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words, *characters]
    (folder / "vocab.txt").write_text("\n".join(vocabulary), "utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    config = transformers.BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=EMBEDDING_SIZE,
        num_hidden_layers=1,
        num_attention_heads=12,
        intermediate_size=8,
        max_position_embeddings=48,
    )
    transformers.BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def bert_copy(bert, tmp_path) -> Path:
    import shutil

    return Path(shutil.copytree(bert, tmp_path / "bert"))


class TestBertEncoder:
    CONDITIONS = (Condition(LUNG), FREEDOM, Condition(MEDIASTINUM, (Disease.MEDIASTINAL_MASS,)), Condition(LUNG))

    def test_it_is_the_cls_vector_of_the_sentence(self, bert):
        from transformers import BertModel, BertTokenizer

        vectors = BertEncoder(bert).encode(self.CONDITIONS)
        assert vectors.shape == (4, 1, EMBEDDING_SIZE) and vectors.dtype == torch.float32
        tokenizer, model = BertTokenizer.from_pretrained(bert), BertModel.from_pretrained(bert).eval()
        for condition, vector in zip(self.CONDITIONS, vectors, strict=True):
            with torch.no_grad():
                expected = model(**tokenizer(condition.sentence(), return_tensors="pt")).last_hidden_state[:, 0]
            torch.testing.assert_close(vector, expected)
        assert not torch.allclose(vectors[0], vectors[1], atol=1e-3)

    def test_a_sentence_is_computed_once(self, bert, monkeypatch):
        encoder = BertEncoder(bert)
        first = encoder.encode(self.CONDITIONS)
        monkeypatch.setattr(encoder, "_model", None)
        assert torch.equal(encoder.encode(self.CONDITIONS), first)

    def test_a_sentence_that_is_too_long_is_not_cut(self, bert):
        with pytest.raises(ConditionError, match=r"\d+ tokens, the language model reads 48; shorten"):
            BertEncoder(bert).encode([Condition(LUNG, tuple(Disease))])

    def check(self, folder: Path, message: str) -> None:
        with pytest.raises(WeightError, match=message) as caught:
            BertEncoder(folder)
        assert str(caught.value).endswith(".") and "\n" not in str(caught.value)

    def test_no_folder(self, tmp_path):
        self.check(tmp_path / "typo", "no language model folder.*built-in encoder")

    @pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
    def test_a_file_is_missing(self, bert_copy, name):
        (bert_copy / name).unlink()
        self.check(bert_copy, name)

    def test_no_vocabulary(self, bert_copy):
        for name in ("vocab.txt", "tokenizer.json"):
            (bert_copy / name).unlink(missing_ok=True)
        self.check(bert_copy, "neither vocab.txt nor tokenizer.json")

    def test_a_pickle(self, bert_copy):
        (bert_copy / "model.safetensors").rename(bert_copy / "pytorch_model.bin")
        self.check(bert_copy, "may run code when opened; convert")

    def test_a_cut_file(self, bert_copy):
        path = bert_copy / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1000])
        self.check(bert_copy, "cannot be loaded .*get it again")

    def test_a_weight_that_lacks_layers(self, bert_copy):
        from safetensors.torch import load_file, save_file

        state = load_file(bert_copy / "model.safetensors")
        state = {key: tensor for key, tensor in state.items() if "attention" not in key}
        save_file(state, bert_copy / "model.safetensors", {"format": "pt"})
        self.check(bert_copy, "not whole .*get it again")

    def test_another_width(self, bert_copy):
        from transformers import BertConfig, BertModel

        config = BertConfig.from_pretrained(bert_copy)
        config.hidden_size = 24
        BertModel(config).save_pretrained(bert_copy)
        self.check(bert_copy, "vectors of 24 numbers.*768")

    def test_transformers_is_not_installed(self, bert, monkeypatch):
        monkeypatch.setitem(sys.modules, "transformers", None)
        with pytest.raises(ConditionError, match="install it, or use the built-in encoder"):
            BertEncoder(bert)
