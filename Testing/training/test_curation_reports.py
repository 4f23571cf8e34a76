"""The report classifier: entities, relations, heads, rounds of annotation; English and Chinese."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from training.curation.__main__ import main, read_annotated
from training.curation.errors import UnreadableReport, UnsuitableAnnotation
from training.curation.evaluate_reports import findings_of, scores
from training.curation.reports.entities import DISEASES, Kind, Status, extract
from training.curation.reports.heads import LearnedClassifier, RuleClassifier, confidence
from training.curation.reports.learning import annotation_rounds, least_confident
from training.curation.reports.relations import RelationModel, assertions, links_from_labels

REPORTS = Path(__file__).resolve().parents[3] / "shared/data/reports/chest_ct_reports.csv"

#: Sentences of our own, and the diseases they tell.
ENGLISH = {
    "Emphysema is observed in both upper lobes. No pleural effusion or pneumothorax was detected.": {"emphysema"},
    "Pleural effusion was not observed. There is linear atelectasis in the left lower lobe.": {"atelectasis"},
    "A 3.5 mm calcified nodule is seen in the right lung. Ribs are normal.": {"pulmonary calcification"},
    "Bilateral pleural effusion, measuring 2 cm, is seen; no pneumothorax.": {"pleural effusion"},
    "Fracture of the left 7th rib. Small pneumothorax on the left.": {"rib fracture", "pneumothorax"},
    "A mass is observed in the anterior mediastinum with enlarged lymph nodes.": {
        "mediastinal mass", "lymph node enlargement"},
    "A thick-walled cavity is present in the right upper lobe.": {"cavity"},
    "Bullae at both apices and traction bronchiectasis with fibrosis.": {"bullae", "bronchiectasis", "fibrosis"},
    "No lymphadenopathy, no mass in the mediastinum. Lungs are normal.": set(),
}  # fmt: skip
CHINESE = {
    "双肺上叶见肺气肿。两侧胸腔未见积液。": {"emphysema"},
    "右肺下叶见条索影，考虑陈旧性病变。未见气胸。": {"fibrosis"},
    "左侧胸腔见少量积液，左肺下叶膨胀不全。": {"pleural effusion", "atelectasis"},
    "右侧第5肋骨骨折，未见气胸及胸腔积液。": {"rib fracture"},
    "前纵隔见一肿块，纵隔淋巴结肿大。": {"mediastinal mass", "lymph node enlargement"},
    "右肺上叶见空洞，双肺支气管扩张。": {"cavity", "bronchiectasis"},
    "右肺上叶钙化灶，右肺尖见肺大疱。": {"pulmonary calcification", "bullae"},
    "双肺间质性改变，呈蜂窝状。": {"diffuse parenchymal lung disease"},
    "气管腔内见肿物，管腔狭窄。": {"tracheal mass"},
    "双肺纹理清晰，未见结节、肿块。纵隔淋巴结未见肿大。": set(),
}


@pytest.mark.parametrize(("text", "wanted"), [*ENGLISH.items(), *CHINESE.items()])
def test_rules_tell_the_diseases(text, wanted):
    (found,) = RuleClassifier()([text])
    told = {name for name, p in found.probabilities.items() if p > 0.5}
    assert told == (wanted or {"no disease"})


def test_sure_reports_pass_the_gate_and_doubtful_ones_do_not():
    sure, doubt = RuleClassifier()(["Emphysema. No pleural effusion.", "Possible pneumothorax on the right?"])
    assert sure.confidence > 0.9 > doubt.confidence


def test_a_report_that_says_nothing_known_is_not_taken_for_healthy():
    (found,) = RuleClassifier()(["Patient did not come."])
    assert found.confidence < 0.9


def test_entities_know_their_place_and_clause():
    text = "No nodule. Emphysema in the right lung."
    found = [(item.kind, item.name, text[item.start : item.end], item.clause) for item in extract(text)]
    assert found == [
        (Kind.STATUS, Status.ABSENT, "No", 0),
        (Kind.FINDING, "nodule", "nodule", 0),
        (Kind.FINDING, "emphysema", "Emphysema", 1),
        (Kind.POSITION, "right", "right", 1),
        (Kind.POSITION, "lung", "lung", 1),
    ]


def test_a_point_in_a_number_ends_no_sentence():
    assert {item.clause for item in extract("A nodule of 3.5 mm in the lung")} == {0}


def test_positions_are_linked_to_their_finding():
    (found,) = assertions("Emphysema in the left upper lobe.", RelationModel())
    assert found.finding == "emphysema" and set(found.positions) == {"left", "upper lobe"}
    assert found.absent < 0.1


def test_a_denial_ends_where_a_contrast_begins():
    found = {item.finding: item for item in assertions("No effusion but bilateral pneumothorax", RelationModel())}
    assert found["pleural effusion"].absent > 0.5 > found["pneumothorax"].absent


def test_relations_are_learned_back_from_known_weights(rng):
    truth = rng.normal(0, 2, len(RelationModel().weights))
    features = rng.normal(0, 1, (4000, len(truth)))
    linked = (rng.random(4000) < RelationModel(truth)(features)).astype(float)
    learned = RelationModel.fitted(features, linked).weights
    assert np.corrcoef(learned, truth)[0, 1] > 0.98
    few = RelationModel.fitted(features[:2], linked[:2], prior=100.0).weights
    np.testing.assert_allclose(few, RelationModel().weights, atol=0.1)


def test_labels_of_whole_reports_tell_links():
    texts = ["No emphysema was seen.", "Emphysema, no nodule.", "No nodule."]
    labels = [{"E": 0}, {"E": 1}, {"E": 0}]
    features, linked = links_from_labels(texts, labels, {"E": "emphysema"})
    assert linked.tolist() == [1, 0] and len(features) == 2


def made_reports(rng, count: int) -> tuple[list[str], list[dict[str, int]]]:
    """Reports with known labels: each finding affirmed, denied or not named."""
    names = {"emphysema": "Emphysema", "atelectasis": "Atelectasis", "bronchiectasis": "Bronchiectasis"}
    texts, labels = [], []
    for _ in range(count):
        report, truth = [], {}
        for name, word in names.items():
            kind = rng.integers(3)
            size = rng.integers(1, 40)
            told = [f"{word} is observed in the lung, {size} mm.", f"No {word.lower()} was detected.", "Heart normal."]
            report.append(told[kind])
            truth[name] = int(kind == 0)
        rng.shuffle(report)
        texts.append(" ".join(report))
        labels.append(truth)
    return texts, labels


class TestLearned:
    @pytest.fixture(autouse=True)
    def sklearn(self):
        pytest.importorskip("sklearn", reason="scikit-learn is not installed (the extra 'training')")

    def test_learns_calibrated_and_survives_saving(self, rng, tmp_path):
        texts, labels = made_reports(rng, 160)
        classifier = LearnedClassifier.learn(texts[:100], labels[:100])
        table = classifier.probabilities(texts[100:])
        truth = np.array([list(report.values()) for report in labels[100:]])
        found = scores(table, truth)
        assert np.nanmin(found.auroc) > 0.98 and found.calibration < 0.1
        classifier.save(tmp_path / "model.npz")
        again = LearnedClassifier.load(tmp_path / "model.npz")
        np.testing.assert_allclose(again.probabilities(texts[100:]), table, atol=1e-5)
        assert again(texts[:1])[0].probabilities.keys() == set(labels[0])

    def test_no_label_of_a_held_out_report_is_looked_at(self, rng):
        texts, labels = made_reports(rng, 60)
        asked: list[int] = []

        def annotate(places):
            asked.extend(places)
            return [labels[n] for n in places]

        rounds = list(annotation_rounds(texts, annotate, first=20, added=10, rounds=3))
        assert [len(item.annotated) for item in rounds] == [20, 30, 40]
        assert len(set(asked)) == len(asked) == 40
        for before, after in zip(rounds, rounds[1:], strict=False):
            new = set(after.annotated) - set(before.annotated)
            rest = sorted(set(range(60)) - set(before.annotated))
            sure = confidence(before.classifier.probabilities([texts[n] for n in rest]))
            asked_for = {rest[k] for k in np.argsort(sure, kind="stable")[:10]}
            assert new == asked_for
        assert least_confident(rounds[-1].classifier, texts, 3)[0] in range(60)

    def test_annotations_that_nothing_can_be_learned_from(self, rng):
        texts, labels = made_reports(rng, 20)
        with pytest.raises(UnsuitableAnnotation, match="annotate"):
            LearnedClassifier.learn(texts, [report | {"cavity": 0} for report in labels])
        with pytest.raises(UnsuitableAnnotation, match="correct"):
            LearnedClassifier.learn(texts, labels[1:])

    @pytest.mark.skipif(not REPORTS.exists(), reason="the annotated chest CT reports are not here")
    @pytest.mark.real_data
    @pytest.mark.slow
    def test_beats_words_alone_on_real_reports(self):
        from training.curation.evaluate_reports import baseline

        texts, labels = read_annotated(REPORTS)
        order = np.random.default_rng(1).permutation(len(texts))
        learned, held = order[:120], order[680:]
        truth = np.array([list(report.values()) for report in labels])
        known, new = [texts[n] for n in learned], [texts[n] for n in held]
        classifier = LearnedClassifier.learn(known, [labels[n] for n in learned], findings_of(list(labels[0])), folds=2)
        ours = scores(classifier.probabilities(new), truth[held])
        words = scores(baseline(known, truth[learned], new), truth[held])
        assert np.nanmean(ours.auroc) > np.nanmean(words.auroc) + 0.01
        assert ours.accuracy_there > 0.96


def test_a_file_that_is_no_classifier_is_told(tmp_path, rng):
    for data in (b"", rng.bytes(100), b"PK\x03\x04" + rng.bytes(100)):
        (tmp_path / "model.npz").write_bytes(data)
        with pytest.raises(UnsuitableAnnotation, match="no report classifier"):
            LearnedClassifier.load(tmp_path / "model.npz")


def test_scores_agree_with_counting_pairs(rng):
    values, truth = rng.integers(0, 5, (30, 2)) / 4, rng.integers(0, 2, (30, 2))
    found = scores(values, truth)
    for n in range(2):
        pairs = [(p > q) + 0.5 * (p == q) for p in values[truth[:, n] == 1, n] for q in values[truth[:, n] == 0, n]]
        assert found.auroc[n] == pytest.approx(np.mean(pairs))


def test_findings_are_found_for_labels_of_other_vocabularies():
    found = findings_of(["Emphysema", "Arterial wall calcification", "Unheard of"])
    assert found == {"Emphysema": "emphysema", "Arterial wall calcification": "arterial calcification"}


def test_annotated_csv(tmp_path):
    (tmp_path / "a.csv").write_text('id,report,A,B,note\n1,"x, y",0,1,hi\n2,z,1,0,0\n')
    assert read_annotated(tmp_path / "a.csv") == (["x, y", "z"], [{"A": 0, "B": 1}, {"A": 1, "B": 0}])
    (tmp_path / "b.csv").write_text("id,report\n1,x\n")
    with pytest.raises(UnreadableReport, match="no column of 0 and 1"):
        read_annotated(tmp_path / "b.csv")


def test_the_paper_has_14_diseases():
    assert len(DISEASES) == len(set(DISEASES)) == 14


class TestShell:
    def test_from_archive_to_counts(self, simple_chest, tmp_path, capsys):
        from training.curation.synthetic import write_study

        chest = simple_chest.crop((22, 0, 0), (38, 64, 88))
        write_study(tmp_path / "a/1", chest, "双肺见肺气肿。")
        write_study(tmp_path / "a/2", chest, BurnedInAnnotation="YES", StudyInstanceUID="1.2.3")
        (tmp_path / "r.json").write_text('{"1.2.3": "Emphysema is seen."}')
        out = str(tmp_path / "out")
        assert main(["run", str(tmp_path / "a"), out, "--reports", str(tmp_path / "r.json")]) == 0
        capsys.readouterr()
        assert main(["counts", out]) == 0
        counts = {
            line.rsplit(None, 1)[0].strip(): line.rsplit(None, 1)[1]
            for line in capsys.readouterr().out.split("\n")[:-1]
        }
        assert counts["input scans"] == counts["intact"] == "2" and counts["in shards"] == counts["emphysema"] == "1"
        assert main(["review", out]) == 0
        assert "1.2.3\treview\tburned-in" in capsys.readouterr().out
        assert main(["review", out, "--reject", "1.2.3"]) == 0 and capsys.readouterr().out == ""

    def test_a_round_of_annotation_at_a_site(self, simple_chest, tmp_path, rng, capsys):
        pytest.importorskip("sklearn", reason="scikit-learn is not installed (the extra 'training')")
        from training.curation.synthetic import write_study

        chest = simple_chest.crop((22, 0, 0), (38, 64, 88))
        write_study(tmp_path / "a/1", chest, "Possible emphysema in the lung?", StudyInstanceUID="1.2.3")
        out, asked = str(tmp_path / "out"), tmp_path / "asked.csv"
        assert main(["run", str(tmp_path / "a"), out]) == 0
        assert main(["ask", out, str(asked)]) == 0
        key, report = asked.read_text(encoding="utf-8-sig").splitlines()[1].split(",")[:2]
        assert (key, report) == ("1.2.3", "Possible emphysema in the lung?")
        lines = ["id,report,emphysema", *(f"{n},Possible emphysema in the lung?,1" for n in range(60))]
        lines += [f"n{n},Heart normal.,0" for n in range(60)]
        (tmp_path / "annotated.csv").write_text("\n".join(lines))
        assert main(["learn", str(tmp_path / "annotated.csv"), str(tmp_path / "model.npz")]) == 0
        assert main(["run", str(tmp_path / "a"), out, "--classifier", str(tmp_path / "model.npz"), "--again"]) == 0
        assert "packed            1" in capsys.readouterr().out

    def test_mistakes_are_told_without_a_traceback(self, tmp_path, capsys):
        assert main(["status", str(tmp_path)]) == 2
        assert "no ledger" in capsys.readouterr().err
        assert main(["run", str(tmp_path / "none"), str(tmp_path / "out")]) == 2
        assert "no folder" in capsys.readouterr().err
