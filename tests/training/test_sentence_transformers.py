"""Our rankers and rows in sentence-transformers and mteb."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from sentence_transformers import CrossEncoder
from sentence_transformers.cross_encoder import CrossEncoderTrainer, CrossEncoderTrainingArguments
from sentence_transformers.cross_encoder.evaluation import CrossEncoderRerankingEvaluator
from sentence_transformers.cross_encoder.losses import MarginMSELoss

from hf_disranker import BertDistilledRanker, Ranker, load_groups
from hf_disranker.data.tables import pair_texts
from hf_disranker.evaluation.metrics import by_query, query_mean
from hf_disranker.training.sentence_transformers import PointMarginMSELoss, to_n_tuples

TEXTS = ["json load read a document", "histogram of numbers", "open a file"]


@pytest.fixture
def cross_encoder(student_dir):
    return CrossEncoder(student_dir, device="cpu")


@pytest.fixture
def scored(judgments):
    """Every document with a score of its own: the label and a little for its place."""
    place = judgments.groupby("query_id").cumcount()
    return judgments.assign(teacher_score=(judgments["label"] + place / 100).astype("float32"))


def test_predict_and_rank_give_our_raw_logits(cross_encoder, student_ranker):
    pairs = [("read json", text) for text in TEXTS]
    expected = student_ranker.predict(pairs)
    np.testing.assert_allclose(cross_encoder.predict(pairs), expected, atol=1e-5)
    ours = student_ranker.rank("read json", TEXTS)
    theirs = cross_encoder.rank("read json", TEXTS)
    assert [hit["corpus_id"] for hit in theirs] == [hit["corpus_id"] for hit in ours]


def test_probabilities_have_a_name_of_their_own(cross_encoder, student_ranker):
    pairs = [("read json", text) for text in TEXTS]
    expected = cross_encoder.predict(pairs, activation_fn=torch.nn.Sigmoid())
    np.testing.assert_allclose(student_ranker.probabilities(pairs), expected, atol=1e-6)
    assert ((expected > 0) & (expected < 1)).all()


def test_their_reranking_evaluator_agrees_with_our_measures(cross_encoder, student_dir, judgments):
    graded = judgments.assign(label=(judgments["label"] == 2).astype(int))
    samples = [
        {
            "query": rows["query"].iloc[0],
            "positive": list((rows["title"] + " " + rows["summary"])[rows["label"] == 1]),
            "negative": list((rows["title"] + " " + rows["summary"])[rows["label"] == 0]),
        }
        for _, rows in graded.groupby("query_id", sort=False)
    ]
    found = CrossEncoderRerankingEvaluator(samples, at_k=10, name="dev")(cross_encoder)
    scores = Ranker.from_pretrained(student_dir).predict(pair_texts(graded))
    ours = query_mean(by_query(graded["label"], scores, graded["query_id"])["mrr"])
    assert found["dev_mrr@10"] == pytest.approx(ours, abs=1e-6)


def test_their_trainer_fine_tunes_ours_further(cross_encoder, scored, tmp_path):
    rows = to_n_tuples(load_groups(scored), documents=3)

    def margin_error():
        found = [cross_encoder.predict(list(zip(rows["query"], rows[name], strict=True))) for name in documents]
        wanted = np.array(rows["scores"]).T
        return np.mean([((found[0] - found[i]) - (wanted[0] - wanted[i])) ** 2 for i in (1, 2)])

    documents = ["positive", "negative_1", "negative_2"]
    before = margin_error()
    arguments = CrossEncoderTrainingArguments(
        str(tmp_path), max_steps=120, learning_rate=5e-4, report_to="none", use_cpu=True
    )
    trainer = CrossEncoderTrainer(cross_encoder, arguments, train_dataset=rows, loss=MarginMSELoss(cross_encoder))
    trainer.train()
    assert margin_error() < 0.7 * before
    cross_encoder.save_pretrained(str(tmp_path / "tuned"))
    again = Ranker.from_pretrained(tmp_path / "tuned")
    assert type(again.model) is BertDistilledRanker
    pairs = [("read json", text) for text in TEXTS]
    np.testing.assert_allclose(again.predict(pairs), cross_encoder.predict(pairs), atol=1e-5)
    config = json.loads(Path(tmp_path, "tuned", "config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"]


def test_only_documents_with_a_score_make_tuples(scored):
    groups = load_groups(scored).to_list()[:3]
    groups[0]["teacher_scores"] = None
    groups[2]["teacher_scores"][0] = None
    rows = to_n_tuples(Dataset.from_list(groups), documents=2)
    assert len(rows) == sum(len(group["doc_ids"]) - 1 for group in groups[1:]) - 1
    assert all(score == score for scores in rows["scores"] for score in scores)


def test_a_cross_encoder_in_half_precision_is_warned_of(cross_encoder, caplog):
    PointMarginMSELoss(cross_encoder)
    assert caplog.text == ""
    PointMarginMSELoss(cross_encoder.bfloat16())
    assert "trained in bfloat16" in caplog.text and "model_kwargs={'dtype': 'float32'}" in caplog.text


@pytest.mark.parametrize(("point", "margin"), [(1.0, 0.0), (0.0, 1.0)])
def test_point_margin_loss_matches_stock_mse_on_pairs(cross_encoder, scored, point, margin):
    rows = to_n_tuples(load_groups(scored), documents=2)
    texts = [rows[name] for name in ("query", "positive", "negative_1")]
    labels = torch.tensor(rows["scores"])
    cross_encoder.eval()
    parts = PointMarginMSELoss(cross_encoder, point, margin)(texts, labels)
    scores = torch.tensor(
        np.stack([cross_encoder.predict(list(zip(texts[0], texts[column], strict=True))) for column in (1, 2)], axis=1)
    )
    stock = MarginMSELoss(cross_encoder)(texts, labels) if margin else torch.nn.MSELoss()(scores, labels)
    assert sum(parts.values()).item() == pytest.approx(stock.item(), rel=1e-4)
    with pytest.raises(ValueError, match="need as many scores"):
        PointMarginMSELoss(cross_encoder)(texts, labels[:, :1])


def test_their_trainer_learns_with_our_loss(cross_encoder, scored, tmp_path):
    rows = to_n_tuples(load_groups(scored), documents=3)

    def error():
        names = ["positive", "negative_1", "negative_2"]
        found = [cross_encoder.predict(list(zip(rows["query"], rows[name], strict=True))) for name in names]
        return np.mean((np.array(found) - np.array(rows["scores"]).T) ** 2)

    before = error()
    arguments = CrossEncoderTrainingArguments(
        str(tmp_path), max_steps=60, learning_rate=1e-3, report_to="none", use_cpu=True, logging_steps=30
    )
    trainer = CrossEncoderTrainer(cross_encoder, arguments, train_dataset=rows, loss=PointMarginMSELoss(cross_encoder))
    trainer.train()
    assert error() < 0.3 * before
    assert {"point_mse", "margin_mse"} <= trainer.state.log_history[0].keys()


def test_n_tuples_match_hand_example():
    groups = Dataset.from_list(
        [
            {"query": "q", "titles": list("abcd"), "summaries": [""] * 4, "teacher_scores": [1.0, 3.0, 2.0, 0.0]},
            {"query": "r", "titles": list("ab"), "summaries": [""] * 2, "teacher_scores": [1.0, 3.0]},
        ]
    )
    rows = to_n_tuples(groups, documents=3).to_list()
    assert rows == [
        {"query": "q", "positive": "b", "negative_1": "c", "negative_2": "a", "scores": [3.0, 2.0, 1.0]},
        {"query": "q", "positive": "b", "negative_1": "a", "negative_2": "d", "scores": [3.0, 1.0, 0.0]},
    ]


def test_too_few_documents_are_counted_or_refused(scored, caplog):
    groups = load_groups(scored)
    to_n_tuples(groups, documents=5)
    assert "6 of 12 queries have fewer than 5 documents" in caplog.text
    with pytest.raises(ValueError, match="No query has 8 documents"):
        to_n_tuples(groups, documents=8)
    with pytest.raises(ValueError, match="at least 2"):
        to_n_tuples(groups, documents=1)


def test_mteb_evaluates_a_student(cross_encoder, student_ranker):
    mteb = pytest.importorskip("mteb")
    from mteb.mocks.mock_tasks import MockRerankingTask

    task = MockRerankingTask()
    task.load_data()
    data = task.dataset["default"]["test"]
    documents = {row["id"]: f"{row['title']} {row['text']}" for row in data["corpus"]}
    pairs = [(row, doc_id) for row in data["queries"] for doc_id in data["top_ranked"][row["id"]]]
    scores = student_ranker.predict([(row["text"], documents[doc_id]) for row, doc_id in pairs])
    labels = [data["relevant_docs"][row["id"]][doc_id] for row, doc_id in pairs]
    for sign in (1, -1):  # the task is tiny: a wrong order would be right for one of the two
        cross_encoder[0].auto_model.classifier.weight.data.mul_(sign)
        cross_encoder[0].auto_model.classifier.bias.data.mul_(sign)
        found = mteb.evaluate(cross_encoder, MockRerankingTask(), cache=None).task_results[0].get_score()
        expected = query_mean(by_query(labels, sign * scores, [row["id"] for row, _ in pairs])["map"])
        assert found == pytest.approx(expected, abs=1e-4)
